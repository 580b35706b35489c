"""A TCP proxy whose connections can be turned into black holes in mid-reply."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading

BUFFER_BYTES = 1 << 16


class Proxy:
    """Forwards to a port of this machine, on one thread."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._peer: dict[socket.socket, socket.socket] = {}
        self._from_server: set[socket.socket] = set()
        self._doomed: set[socket.socket] = set()
        """Sides of connections that go silent with the server's next reply."""
        self._lock = threading.Lock()
        self.num_swallowed = 0
        """Connections that have gone silent."""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._forward, name="proxy", daemon=True)
        self._thread.start()

    def swallow(self) -> None:
        """From the server's next reply on, the present connections carry nothing, and nobody is told.

        Half of that reply arrives. Connections that are made later work, as they do when a firewall has forgotten
        those that it knew.
        """
        with self._lock:
            self._doomed |= set(self._peer)

    def _forward(self) -> None:
        while not self._closed.is_set():
            for key, _ in self._selector.select(timeout=0.1):
                with self._lock, contextlib.suppress(OSError):
                    self._serve(key.fileobj)  # type: ignore[arg-type]

    def _serve(self, ready: socket.socket) -> None:
        if ready is self._listener:
            client, _ = self._listener.accept()
            server = socket.create_connection(("127.0.0.1", self._target_port))
            self._peer[client], self._peer[server] = server, client
            self._from_server.add(server)
            for side in (client, server):
                side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._selector.register(side, selectors.EVENT_READ)
            return
        try:
            data = ready.recv(BUFFER_BYTES)
        except ConnectionError:
            data = b""
        if not data:
            self._drop(ready)
        elif ready in self._doomed and ready in self._from_server:
            self._peer[ready].sendall(data[: len(data) // 2])
            self._silence(ready)
        else:
            self._peer[ready].sendall(data)

    def _silence(self, server: socket.socket) -> None:
        """Both sides stay connected, to nobody."""
        self.num_swallowed += 1
        for side in (server, self._peer[server]):
            self._selector.unregister(side)
            self._doomed.discard(side)

    def _drop(self, side: socket.socket) -> None:
        peer = self._peer.pop(side)
        self._peer.pop(peer)
        for one in (side, peer):
            self._selector.unregister(one)
            self._from_server.discard(one)
            self._doomed.discard(one)
            one.close()

    def close(self) -> None:
        self._closed.set()
        self._thread.join(5.0)
        self._selector.close()
        for side in [*self._peer, self._listener]:
            side.close()
