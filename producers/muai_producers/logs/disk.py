"""Keeping the disk from filling up: old logs and artefacts go first, and requests go on with fewer logs."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from muai_producers.monitoring.guard import guarded, standings

if TYPE_CHECKING:
    from muai_config import Settings

log = logging.getLogger(__name__)
Sort = Literal["old logs", "traces", "leftovers", "converted models"]
ORDER: tuple[Sort, ...] = ("old logs", "traces", "leftovers", "converted models")
"""What goes first: of the last, what is deleted is made again when it is needed, at a cost."""
CHECK_EVERY_S = 15.0
REDUCED_FOR_S = 30.0
"""How long after a write that did not fit fewer lines are written."""
MODEL_IDLE_S = 3600.0
"""A converted model that was used within this time is left where it is."""
LEFTOVER_S = 3600.0


@dataclass(frozen=True)
class Candidate:
    """Something that may be deleted."""

    sort: Sort
    path: Path
    num_bytes: int
    used_s: float
    """When it was last used; wall-clock seconds since the epoch."""


@dataclass(frozen=True)
class Places:
    """Where an installation writes on this machine. None: it does not."""

    logs: Path | None = None
    models: Path | None = None
    files: Path | None = None

    def all(self) -> tuple[Path, ...]:
        """Those there are, or the folders that they will be in."""
        return tuple(existing(one) for one in (self.logs, self.models, self.files) if one is not None)


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def places_of(settings: Settings) -> Places:
    """The folders that the configuration names."""
    from muai_producers.cli.invocation import home_folder

    return Places(
        settings.monitoring.logs.folder,
        settings.optimization.onnx.conversions_folder,
        settings.gateway.files.folder or home_folder() / "files",
    )


def chosen(candidates: Iterable[Candidate], needed_bytes: int, now_s: float) -> list[Candidate]:
    """What to delete so that `needed_bytes` more are free: sort by sort, the longest unused first, and no more than
    that. What is in use is never chosen: a model or a leftover that was touched within the last hour.
    """
    taken: list[Candidate] = []
    for one in sorted(candidates, key=lambda one: (ORDER.index(one.sort), one.used_s)):
        if needed_bytes <= 0:
            break
        if one.sort == "converted models" and now_s - one.used_s < MODEL_IDLE_S:
            continue
        if one.sort == "leftovers" and now_s - one.used_s < LEFTOVER_S:
            continue
        taken.append(one)
        needed_bytes -= one.num_bytes
    return taken


def candidates(places: Places) -> list[Candidate]:
    """What may be deleted: logs put aside, exported traces, what crashes left behind, converted models."""
    found: list[Candidate] = []
    if places.logs is not None:
        found += _each("old logs", places.logs.glob("*.log.*"))
        found += _each("traces", places.logs.glob("*.traces*"))
    if places.files is not None:
        found += _each("leftovers", places.files.glob(".partial-*"))
    if places.models is not None:
        folders = [one for one in _listed(places.models) if one.is_dir()]
        found += _each("leftovers", (one for one in folders if one.name.startswith(".")))
        found += _each("converted models", (one for one in folders if not one.name.startswith(".")))
    return found


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _each(sort: Sort, paths: Iterable[Path]) -> list[Candidate]:
    found = []
    for path in paths:
        try:
            files = [one.stat() for one in path.rglob("*") if one.is_file()] if path.is_dir() else [path.stat()]
            used_s = max((max(one.st_atime, one.st_mtime) for one in files), default=path.stat().st_mtime)
        except OSError:  # another process deletes too
            continue
        found.append(Candidate(sort, path, sum(one.st_size for one in files), used_s))
    return found


class DiskKeeper:
    """Watches the disks of some places from a thread of its own, and makes room on them when they get full.

    Args:
        min_free_bytes: with less than that free a disk counts as full.
        free_bytes: of the disk that a path is on.
        on_full: told when a disk is full, and of what could be deleted for it; the alert.
    """

    def __init__(
        self,
        places: Places,
        min_free_bytes: int,
        *,
        free_bytes: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
        on_full: Callable[[str], None] | None = None,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._places = places
        self._min_free_bytes = min_free_bytes
        self._free_bytes = free_bytes
        self.on_full = on_full
        self._monotonic_s = monotonic_s
        self._reduced_until_s = 0.0
        self._reported = False
        self._work = threading.Event()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def is_full(self) -> bool:
        """Whether logging is reduced."""
        return self._monotonic_s() < self._reduced_until_s

    def found_full(self) -> None:
        """Something did not fit. Returns at once; the thread makes room."""
        self._reduced_until_s = self._monotonic_s() + REDUCED_FOR_S
        self._work.set()

    def start(self) -> None:
        """Watch from now on."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="muai-disk", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Watch no more."""
        self._closed.set()
        self._work.set()

    def _watch(self) -> None:
        while not self._closed.is_set():
            was_called = self._work.wait(CHECK_EVERY_S)
            self._work.clear()
            if not self._closed.is_set():
                self.check(was_called=was_called)

    @guarded("logs")
    def check(self, *, was_called: bool = False) -> None:
        """Look at each disk, and make room on those that are full.

        Args:
            was_called: something did not fit, whatever the disk says of itself.
        """
        short: dict[Path, int] = {}
        for place in self._places.all():
            try:
                missing = self._min_free_bytes - self._free_bytes(place)
            except OSError:
                continue
            if missing > 0:
                short[place] = missing
        if short or was_called:
            self._make_room(max(short.values(), default=self._min_free_bytes), list(short))
        elif self._reported and not self.is_full:
            self._reported = False
            standings.clear("logs")

    def _make_room(self, needed_bytes: int, full: Sequence[Path]) -> None:
        self._reduced_until_s = self._monotonic_s() + REDUCED_FOR_S
        deleted = [one for one in chosen(candidates(self._places), needed_bytes, time.time()) if _delete(one)]
        if self._reported and not deleted:
            return  # said already, and nothing has changed
        freed = sum(one.num_bytes for one in deleted)
        kinds = ", ".join(sort for sort in ORDER if any(one.sort == sort for one in deleted)) or "nothing to delete"
        where = ", ".join(map(str, full)) or "a log"
        told = (
            f"the disk is full ({where}): {freed / 1e6:.1f} MB freed ({kinds}); fewer lines are logged, requests go on"
        )
        self._reported = True
        log.error("%s", told)
        standings.report("logs", told)
        if self.on_full is not None:
            self.on_full(told)


def _delete(one: Candidate) -> bool:
    try:
        if one.path.is_dir():
            shutil.rmtree(one.path)
        else:
            one.path.unlink()
    except OSError:  # another process was faster, or it is not ours
        return False
    return True
