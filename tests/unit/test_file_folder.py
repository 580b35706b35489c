"""Files on disks that are full or cannot be written to, and what crashes leave behind."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from muai_producers.files.folder import PARTIAL, PARTIAL_KEPT_S, FileFolder, refusing_bad_disks
from muai_producers.files.records import DiskFullError, FileUnavailableError


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, DiskFullError),
        (errno.EDQUOT, DiskFullError),
        (errno.EROFS, FileUnavailableError),
        (errno.EACCES, FileUnavailableError),
        (errno.EIO, OSError),
    ],
)
def test_given_a_disk_that_fails_then_the_error_is_one_that_says_what_to_do(number: int, kind: type[Exception]) -> None:
    with pytest.raises(kind), refusing_bad_disks():
        raise OSError(number, os.strerror(number))


def test_given_a_folder_that_cannot_be_made_then_it_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(FileUnavailableError, match=r"gateway\.files\.folder"),
        FileFolder(tmp_path / "file" / "x").writing(),
    ):
        pass


def test_given_a_file_that_is_written_then_it_has_its_name_when_it_is_whole_and_nothing_is_left_otherwise(
    tmp_path: Path,
) -> None:
    folder = FileFolder(tmp_path / "files")
    with folder.writing() as (file, partial):
        file.write(b"all of it")
        assert not folder.content("file-1").exists()
        folder.keep(file, partial, "file-1")
    assert folder.content("file-1").read_bytes() == b"all of it"
    with folder.writing() as (file, _):
        file.write(b"half")
    assert [path.name for path in folder.path.iterdir()] == ["file-1"]


def test_given_leftovers_then_old_and_unknown_ones_are_swept(tmp_path: Path) -> None:
    folder = FileFolder(tmp_path)
    for name in ("file-known", "file-gone", f"{PARTIAL}old", f"{PARTIAL}new", "batch_1.output.me"):
        (tmp_path / name).touch()
    old_s = time.time() - 2 * PARTIAL_KEPT_S
    for name in ("file-known", "file-gone", f"{PARTIAL}old", "batch_1.output.me"):
        os.utime(tmp_path / name, (old_s, old_s))
    assert folder.sweep(lambda name: name in ("file-known", "batch_1")) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"file-known", f"{PARTIAL}new", "batch_1.output.me"}
