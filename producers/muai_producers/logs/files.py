"""Handlers that a full disk does not stop, and that say so rather than complain on stderr at every line."""

from __future__ import annotations

import errno
import logging
import logging.handlers
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from muai_producers.monitoring.guard import standings

if TYPE_CHECKING:
    from muai_producers.logs.disk import DiskKeeper

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ReducedWhenFull(logging.Filter):
    """While the disk is full, warnings and worse alone: what is left of it is theirs."""

    def __init__(self, keeper: DiskKeeper) -> None:
        super().__init__()
        self._keeper = keeper

    def filter(self, record: logging.LogRecord) -> bool:
        """See `logging.Filter`."""
        return record.levelno >= logging.WARNING or not self._keeper.is_full


class _Guarded(logging.Handler):
    """What cannot be written is counted."""

    _keeper: DiskKeeper

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the standard library's name
        """Called where writing a line has raised."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError) and error.errno in FULL:
            self._keeper.found_full()
        elif record.name != "muai_producers.monitoring.guard" and isinstance(error, Exception):
            standings.fail("logs", error)


class StreamLog(_Guarded, logging.StreamHandler[TextIO]):
    """Lines to a stream."""

    def __init__(self, stream: TextIO, keeper: DiskKeeper) -> None:
        super().__init__(stream)
        self._keeper = keeper


class RotatingLog(_Guarded, logging.handlers.RotatingFileHandler):
    """Lines to a file that is put aside when it is large enough; the oldest of those put aside is deleted.

    Args:
        max_bytes: of one file.
        num_kept: files kept beside the present one.
    """

    def __init__(self, file: Path, max_bytes: int, num_kept: int, keeper: DiskKeeper) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        super().__init__(file, maxBytes=max_bytes, backupCount=num_kept, encoding="utf-8", delay=True)
        self._keeper = keeper

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`. The file is opened anew where it was deleted, and after a full disk."""
        try:
            if self.stream is not None and not Path(self.baseFilename).exists():
                self.stream.close()
                self.stream = None
        except OSError:
            self.stream = None
        super().emit(record)
