"""The server's last moment: a connection that was made before it is answered, one made after it is refused."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
import uvicorn
import uvloop

from muai_producers.gateway.parting import PartingServer

REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """503, as a gateway that drains."""
    headers = [(b"connection", b"close"), (b"content-length", b"0")]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


async def started() -> tuple[PartingServer, int]:
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, access_log=False, lifespan="off")
    config.load()
    server = PartingServer(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    return server, server.servers[0].sockets[0].getsockname()[1]


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5.0)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_given_connections_that_the_server_has_not_seen_when_it_ends_then_each_is_answered(run: Any) -> None:
    async def scenario() -> None:
        server, port = await started()
        taken = connected(port)
        await asyncio.sleep(0.05)
        # The loop does not turn from here on: the request is not read, the other connections are not taken.
        taken.sendall(REQUEST)
        waiting = [connected(port) for _ in range(5)]
        for client in waiting:
            client.sendall(REQUEST)
        await server.shutdown()
        for client in (taken, *waiting):
            with client:
                assert client.recv(100).startswith(b"HTTP/1.1 503 ")
        with pytest.raises(ConnectionRefusedError):
            connected(port)

    run(scenario())


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_given_one_that_connects_and_says_nothing_then_the_end_does_not_wait_for_it(run: Any) -> None:
    async def scenario() -> None:
        server, port = await started()
        with connected(port) as client:
            async with asyncio.timeout(5.0):
                await server.shutdown()
            assert client.recv(100) == b""

    run(scenario())
