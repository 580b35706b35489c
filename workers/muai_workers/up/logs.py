"""The output of several processes as one stream of lines."""

from __future__ import annotations

import contextlib
import os
import selectors
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO

MAX_LINE_BYTES = 16_384
"""Of a longer line the rest comes as a line of its own: a process that never ends its line must not fill the memory."""
READ_BYTES = 65_536


@dataclass
class _Pipe:
    name: str
    file: IO[bytes]
    pending: bytearray = field(default_factory=bytearray)


class LogPipes:
    """Reads the pipes of running processes; also wakes its reader when told to, from any thread or signal handler."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake_read, self.wake_write = os.pipe()
        for end in (self._wake_read, self.wake_write):
            os.set_blocking(end, False)
        self._selector.register(self._wake_read, selectors.EVENT_READ)

    def add(self, name: str, file: IO[bytes]) -> None:
        """Read what `name` writes from now on, until its end."""
        os.set_blocking(file.fileno(), False)
        self._selector.register(file, selectors.EVENT_READ, _Pipe(name, file))

    def wake(self) -> None:
        """Make the `read` that waits, or the next one, return at once."""
        with contextlib.suppress(BlockingIOError):  # so full that it will wake anyhow
            os.write(self.wake_write, b"\0")

    def read(self, timeout_s: float) -> Iterator[tuple[str, str]]:
        """Yield `(name, line)` of what is there, waiting up to `timeout_s` for the first of it."""
        for key, _ in self._selector.select(timeout_s):
            if key.fd == self._wake_read:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_read, READ_BYTES)
            else:
                yield from self._read_pipe(key.data)

    def _read_pipe(self, pipe: _Pipe) -> Iterator[tuple[str, str]]:
        try:
            data = os.read(pipe.file.fileno(), READ_BYTES)
        except BlockingIOError:
            return
        pipe.pending += data
        *lines, rest = pipe.pending.split(b"\n")
        if not data or len(rest) > MAX_LINE_BYTES:
            lines, rest = [*lines, rest], bytearray()
        pipe.pending = rest
        for line in lines:
            if line.strip():
                yield pipe.name, line.decode("utf-8", "replace").rstrip("\r")
        if not data:
            self._selector.unregister(pipe.file)
            pipe.file.close()

    def close(self) -> None:
        """Close everything that is still open."""
        for key in list(self._selector.get_map().values()):
            if isinstance(key.data, _Pipe):
                key.data.file.close()
        self._selector.close()
        os.close(self._wake_read)
        os.close(self.wake_write)
