"""The HTTP server's last moment: whoever has already connected is still answered.

Closing a listening socket resets the connections that the system has taken and the server has not, and uvicorn closes
at once those whose request it has not read yet. Clients see both as a request that was sent and never answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from typing import Any

import uvicorn

LAST_READ_S = 0.25
"""So long after the last connection was taken, requests are still read and answered."""


class PartingServer(uvicorn.Server):
    """A server that alone listens on its address."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End as uvicorn does, once those who had connected have been heard."""
        if not self.force_exit:
            await self._hear_the_last()
        await super().shutdown(sockets)

    async def _hear_the_last(self) -> None:
        taken = self._stop_listening()
        opening = [asyncio.create_task(self._serve_connection(connection)) for connection in taken]
        await asyncio.sleep(LAST_READ_S)
        for task in opening:  # in the midst of a TLS handshake
            task.cancel()
        await asyncio.gather(*opening, return_exceptions=True)

    def _stop_listening(self) -> list[socket.socket]:
        """Refuse new connections from now on; returns those that the system has taken meanwhile."""
        listening = [socket.socket(fileno=os.dup(one.fileno())) for server in self.servers for one in server.sockets]
        for server in self.servers:
            server.close()
        taken = []
        for one in listening:
            with one, contextlib.suppress(OSError):
                one.setblocking(False)
                while True:
                    taken.append(one.accept()[0])
        return taken

    async def _serve_connection(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(self._protocol, connection, ssl=self.config.ssl)
        except BaseException:
            connection.close()
            raise

    def _protocol(self) -> Any:
        return self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
