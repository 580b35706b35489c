"""Waiting for messages without taking any: peeks, in Celery's event loop and in `drain_events` alike."""

from __future__ import annotations

import contextlib
import select
import socket
import time
import weakref
from collections.abc import Callable
from queue import Empty
from typing import Any

from kombu.utils.eventio import ERR, READ
from redis.exceptions import OutOfMemoryError, ResponseError

from muai_batching.transport import stock
from muai_batching.transport.ledger import CONNECTION_ERRORS

#: A peek is answered at the latest after this long, so that a connection gone silent is noticed within twice that.
PEEK_S = 4.0

#: A Redis over its memory limit refuses peeks; its lists are looked at this often instead.
REFUSED_PAUSE_S = 0.1

#: What Redis answers when a list has been closed; it may be opened again, and is looked at this often.
WRONG_TYPE = "WRONGTYPE"
CLOSED_PAUSE_S = 1.0

#: Once an answer that the event loop was told of has begun to arrive, the rest of it is waited for this long: the loop
#: stands still.
REST_OF_ANSWER_S = 1.0


def _readable(sock: Any) -> bool:
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    return bool(poller.poll(0))


class Peek:
    """A connection that waits for one list to have something.

    Moving a list's last element to where it is blocks until there is one, takes nothing, and wakes every waiter.
    """

    def __init__(self, pool: Any, key: str, channel: Any) -> None:
        self.key = key
        self.channel = channel
        self._pool = pool
        self._connection = pool.get_connection()
        self._sent_at_s: float | None = None
        self._not_before_s = 0.0
        self.fd: int = self._connection._sock.fileno()

    def arm(self) -> None:
        """Wait for the list, unless this peek waits already."""
        if self._sent_at_s is not None:
            return
        now_s = time.monotonic()
        if now_s >= self._not_before_s:
            self._sent_at_s = now_s
            self._connection.send_command("BLMOVE", self.key, self.key, "RIGHT", "RIGHT", PEEK_S)

    def read(self) -> bool:
        """Take the answer that is there; True when the list may have something."""
        self._sent_at_s = None
        try:
            return self._connection.read_response(timeout=REST_OF_ANSWER_S) is not None
        except OutOfMemoryError:
            # Such a Redis still lets messages be claimed, and every one done with frees memory.
            self._not_before_s = time.monotonic() + REFUSED_PAUSE_S
            return True
        except ResponseError as error:
            if not str(error).startswith(WRONG_TYPE):
                raise
            self._not_before_s = time.monotonic() + CLOSED_PAUSE_S
            return False

    def is_overdue(self, now_s: float) -> bool:
        sent_at_s = self._sent_at_s
        return sent_at_s is not None and now_s - sent_at_s > 2 * PEEK_S and not _readable(self._connection._sock)

    def close(self) -> None:
        self._connection.disconnect()
        self._pool.release(self._connection)


class Waker:
    """A socket pair of which one end turns readable on demand."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self.fd = self._reader.fileno()
        self.close = weakref.finalize(self, _close_all, self._reader, self._writer)

    def wake(self) -> None:
        # A full buffer wakes just as well, and a closed one has nobody to wake.
        with contextlib.suppress(OSError):
            self._writer.send(b"w")

    def drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._reader.recv(4096)


def _close_all(*sockets: socket.socket) -> None:
    for sock in sockets:
        sock.close()


class Poller(stock.MultiChannelPoller):  # type: ignore[misc]
    """kombu's poller for pub/sub, with peeks in the place of BRPOP.

    A waker lets the next poll return at once: when a channel has more to claim, or when another
    thread ends a claim that a channel at its prefetch limit waited for.
    """

    def __init__(self) -> None:
        super().__init__()
        self._peeks: dict[int, Peek] = {}
        self._announced: dict[int, Any] = {}
        self._waker: Waker | None = None
        self._hub: Any = None

    # Registration, in the hub or in the poller of `drain_events`

    def use_hub(self, hub: Any) -> None:
        """Let an event loop do the polling from now on."""
        self._hub = hub
        self._announced.clear()
        for fd in self._peeks:
            self._watch(fd)
        if self._waker is not None:
            self._watch(self._waker.fd)

    def _watch(self, fd: int) -> None:
        if self._hub is not None:
            self._hub.add_reader(fd, self.on_readable, fd)
        else:
            self.poller.register(fd, READ | ERR)

    def _unwatch(self, fd: int) -> None:
        with contextlib.suppress(KeyError, ValueError, OSError):
            if self._hub is not None:
                self._hub.remove(fd)
            else:
                self.poller.unregister(fd)

    @property
    def fds(self) -> dict[int, Any]:
        """Pub/sub sockets that the event loop has not been told of."""
        socks = {sock.fileno(): sock for sock in self._chan_to_sock.values()}
        fresh = {fd: sock for fd, sock in socks.items() if self._announced.get(fd) is not sock}
        self._announced = socks
        return {fd: self._fd_to_chan[fd] for fd in fresh if fd in self._fd_to_chan}

    def close(self) -> None:
        for peek in list(self._peeks.values()):
            self.drop_peek(peek)
        if self._waker is not None:
            self._unwatch(self._waker.fd)
            self._waker.close()
            self._waker = None
        super().close()

    # Peeks

    def open_peek(self, pool: Any, key: str, channel: Any) -> Peek:
        peek = Peek(pool, key, channel)
        self._peeks[peek.fd] = peek
        self._watch(peek.fd)
        return peek

    def drop_peek(self, peek: Peek) -> None:
        if self._peeks.get(peek.fd) is peek:
            del self._peeks[peek.fd]
            self._unwatch(peek.fd)
        peek.channel.peek_dropped(peek)
        peek.close()

    def check_peeks(self) -> None:
        """Drop connections that have gone silent; the next tick opens new ones."""
        now_s = time.monotonic()
        for peek in list(self._peeks.values()):
            if peek.is_overdue(now_s):
                self.drop_peek(peek)

    # Events

    def enable_wake(self) -> None:
        """Let `wake` work; a poller without consumers needs none of it."""
        if self._waker is None:
            self._waker = Waker()
            self._watch(self._waker.fd)

    def wake(self) -> None:
        """Make the next poll return at once. Any thread may call this."""
        waker = self._waker
        if waker is not None:
            waker.wake()

    def call_later(self, delay_s: float, callback: Callable[[], Any]) -> None:
        """Call after a while, from the event loop; where there is none, at once: what is waited for is then looked at
        again and again.
        """
        if self._hub is not None and delay_s > 0:
            self._hub.call_later(delay_s, callback)
        else:
            callback()

    def on_poll_init(self, poller: Any) -> None:
        self.poller = poller

    def on_poll_start(self) -> None:
        for channel in list(self._channels):
            channel.before_poll()
            if channel.active_fanout_queues:
                self._register_LISTEN(channel)

    def on_readable(self, fileno: int) -> bool:
        """Serve a socket; True when a message was delivered."""
        if self._waker is not None and fileno == self._waker.fd:
            return self._on_wake(self._waker)
        peek = self._peeks.get(fileno)
        if peek is None:
            super().on_readable(fileno)
            return True
        try:
            found = peek.read()
        except CONNECTION_ERRORS:
            # The next tick connects anew, and fails loudly if Redis is gone. What befell one befell them all, most
            # likely, and finding that out one by one would take long.
            for other in [other for other in self._peeks.values() if other.channel is peek.channel]:
                self.drop_peek(other)
            peek.channel.ledger.expect_loss()
            return False
        return bool(found and peek.channel.pump())

    def _on_wake(self, waker: Waker) -> bool:
        waker.drain()
        delivered = [channel.pump() for channel in list(self._channels) if channel.has_more]
        return any(delivered)

    def get(self, callback: Callable[..., Any], timeout: float | None = None) -> None:
        """Deliver what is there, waiting up to `timeout` for it.

        Raises:
            queue.Empty: nothing was delivered.
        """
        self._in_protected_read = True
        try:
            self.maybe_refresh_binding_expiry()
            self.on_poll_start()
            events = self.poller.poll(1.0 if timeout is None else min(timeout, 1.0)) or ()
            delivered = [self.on_readable(fileno) for fileno, _ in events]
            if any(delivered):
                return
            self.check_peeks()
            raise Empty
        finally:
            self._in_protected_read = False
            while self.after_read:
                self.after_read.pop()()

    def maybe_restore_messages(self) -> None:
        """Nothing to look for: heartbeats tell whose messages go back."""

    def maybe_check_brpop_health(self) -> None:
        self.check_peeks()
