"""Files' contents, in a folder that all gateways and control workers see. Written aside, then renamed: a file that has
its name is whole."""

from __future__ import annotations

import errno
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from muai_producers.cli.invocation import home_folder
from muai_producers.files.records import DiskFullError, FileUnavailableError

if TYPE_CHECKING:
    from muai_config import Settings

log = logging.getLogger(__name__)
NOT_WRITABLE = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR})
PARTIAL = ".partial-"
PARTIAL_KEPT_S = 86_400.0


class FileFolder:
    """The folder. It is made when first written to.

    Raises:
        DiskFullError, FileUnavailableError: from whatever writes.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder

    @classmethod
    def from_settings(cls, settings: Settings) -> FileFolder:
        """The folder that is configured."""
        return cls(settings.gateway.files.folder or home_folder() / "files")

    def content(self, file_id: str) -> Path:
        """Where a file's content lies."""
        return self.path / file_id

    def segment(self, batch_id: str, kind: str, owner: str) -> Path:
        """Where one runner of a batch gathers answers."""
        return self.path / f"{batch_id}.{kind}.{owner}"

    @contextmanager
    def writing(self) -> Iterator[tuple[BinaryIO, Path]]:
        """A new file to write and, afterwards, to `keep` or to forget: it is deleted where it was not kept."""
        partial = self.path / f"{PARTIAL}{secrets.token_hex(12)}"
        with refusing_bad_disks():
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = partial.open("xb")
        try:
            with file:
                yield file, partial
        finally:
            partial.unlink(missing_ok=True)

    def keep(self, file: BinaryIO, partial: Path, file_id: str) -> None:
        """Give a file that was written its name, once it is on the disk."""
        with refusing_bad_disks():
            file.flush()
            os.fsync(file.fileno())
            partial.rename(self.content(file_id))

    def delete(self, file_id: str) -> None:
        """Delete a file's content, if it is there."""
        self.content(file_id).unlink(missing_ok=True)

    def sweep(self, is_wanted: Callable[[str], bool], now_s: float | None = None) -> int:
        """Delete what crashes and expiry have left; returns how many.

        Args:
            is_wanted: whether a file's name, up to its first dot, is that of a file or batch that is still known.
        """
        if not self.path.is_dir():
            return 0
        before_s, swept = (time.time() if now_s is None else now_s) - PARTIAL_KEPT_S, 0
        for path in self.path.iterdir():
            if _modified_s(path) < before_s and (
                path.name.startswith(PARTIAL) or not is_wanted(path.name.partition(".")[0])
            ):
                path.unlink(missing_ok=True)
                swept += 1
        return swept


def _modified_s(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another one swept it
        return time.time()


@contextmanager
def refusing_bad_disks() -> Iterator[None]:
    """Raises: DiskFullError, FileUnavailableError: instead of the system's own error."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError("the disk that files are kept on is full (gateway.files.folder)") from error
        if error.errno in NOT_WRITABLE:
            log.error("files cannot be kept: %s", error)
            raise FileUnavailableError(
                "files cannot be kept here: the folder cannot be written to (gateway.files.folder)"
            ) from error
        raise
