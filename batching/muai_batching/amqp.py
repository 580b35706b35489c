"""kombu's AMQP transport, which a silent broker cannot hold up: name `Transport` in Celery's `broker_transport`.

py-amqp reads a frame to its end once it has begun, and asks again and again for the rest: where a connection goes
silent in mid-frame, the process neither sends heartbeats nor misses the broker's, and stands until TCP gives up,
which may be never. Here the part that has come is kept, the loop goes on, and two missed heartbeats end the
connection as they do between frames.

A reply that stays away for the whole of `read_timeout` ends the connection too. Celery swallows that error where it
sends its own events, and would wait as long for the next one, and the next, seldom looking at the heartbeats.
"""

from __future__ import annotations

import errno
from typing import Any

from amqp.exceptions import ConnectionForced, RecoverableConnectionError
from amqp.transport import SSLTransport, TCPTransport
from kombu.transport import pyamqp

_NOTHING_YET = (errno.EAGAIN, errno.EWOULDBLOCK, errno.ENOENT)
"""ENOENT is what a TLS socket says."""

NO_ANSWER = "RabbitMQ does not answer"


class _Interruptible:
    """Reading that tells of a missing rest by `TimeoutError`, in the middle of a frame too; `read_frame` keeps what it
    has and begins anew with it.
    """

    _quick_recv: Any
    _read_buffer: bytes

    def _read(self, n: int, initial: bool = False) -> bytes:
        """Exactly n bytes, as py-amqp's own."""
        got = self._read_buffer
        try:
            while len(got) < n:
                try:
                    piece = self._quick_recv(n - len(got))
                except OSError as error:
                    if error.errno in _NOTHING_YET:
                        raise TimeoutError from None
                    raise
                if not piece:
                    raise OSError("Server unexpectedly closed connection")
                got += piece
        finally:
            self._read_buffer = got
        self._read_buffer = got[n:]
        return got[:n]


class _TCPTransport(_Interruptible, TCPTransport):
    pass


class _SSLTransport(_Interruptible, SSLTransport):
    pass


class _Channel(pyamqp.Channel):
    connection: _Connection

    def wait(self, method: Any, callback: Any = None, timeout: float | None = None, returns_tuple: bool = False) -> Any:
        """A reply, as py-amqp's own; where another one has been missed already, nobody waits."""
        connection = self.connection
        if connection is not None and connection.is_silent:
            raise RecoverableConnectionError(NO_ANSWER)
        try:
            return super().wait(method, callback, timeout, returns_tuple)
        except TimeoutError:
            if timeout is None and connection is not None:
                connection.is_silent = True
            raise


class _Connection(pyamqp.Connection):
    Channel = _Channel
    is_silent = False
    """Whether a reply has stayed away: all that is left to do is to close, and to connect anew."""

    def heartbeat_tick(self, rate: int = 2) -> None:
        """Called by Celery's event loop. Raises `ConnectionForced` when the connection is lost."""
        if self.is_silent:
            raise ConnectionForced(NO_ANSWER)
        try:
            super().heartbeat_tick(rate)
        except ConnectionForced:
            self.is_silent = True
            raise

    def close(self, *args: Any, **kwargs: Any) -> Any:
        """A goodbye that nobody would answer is left out."""
        return self.collect() if self.is_silent else super().close(*args, **kwargs)

    def Transport(self, host: str, connect_timeout: float | None, ssl: Any = False, *args: Any, **kwargs: Any) -> Any:  # noqa: N802
        """Called by py-amqp; it passes read and write timeouts by position."""
        read_timeout, write_timeout = (*args, None, None)[:2]
        made = _SSLTransport if ssl else _TCPTransport
        return made(
            host,
            connect_timeout=connect_timeout,
            ssl=ssl,
            read_timeout=read_timeout,
            write_timeout=write_timeout,
            **kwargs,
        )


class Transport(pyamqp.Transport):
    """For `amqp://` and `amqps://`."""

    Connection = _Connection
