"""Converted models on disk: made once, however many processes want one at once, and never half there."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Conversion:
    """A converted model."""

    folder: Path
    facts: Mapping[str, Any]
    """What was noted when it was made."""


class ConversionStore:
    """A folder of conversions, shared by the processes of a machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open_or_build(self, key: str, build: Callable[[Path], Mapping[str, Any]]) -> Conversion:
        """The conversion of that key, made by `build` when it is not there or its files are damaged.

        Only one process builds at a time; the others wait and find it made. It appears under its key by one rename,
        so a crash in the middle leaves nothing that would be taken for it.

        Args:
            build: writes its files into the folder that it is given and returns the facts to keep.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        final = self._folder / key
        with self._locked(key):
            facts = _read(final)
            if facts is None:
                facts = self._build(final, build)
        return Conversion(final, facts)

    def _build(self, final: Path, build: Callable[[Path], Mapping[str, Any]]) -> Mapping[str, Any]:
        scratch = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=self._folder))
        try:
            facts = dict(build(scratch))
            digests = {file.name: hash_file(file) for file in sorted(scratch.iterdir())}
            (scratch / MANIFEST).write_text(json.dumps({"files": digests, "facts": facts}), encoding="utf-8")
            shutil.rmtree(final, ignore_errors=True)
            scratch.rename(final)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return facts

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        # The kernel frees the lock of a process that dies.
        with (self._folder / f"{key}.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def hash_file(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(folder: Path) -> Mapping[str, Any] | None:
    """The facts of a conversion whose files are all as they were written; None for any other."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        intact = all(hash_file(folder / name) == digest for name, digest in manifest["files"].items())
        facts: Mapping[str, Any] = manifest["facts"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return facts if intact else None
