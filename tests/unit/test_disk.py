"""What goes first when the disk is full, and what stays."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from muai_producers.logs.disk import ORDER, Candidate, DiskKeeper, Places, candidates, chosen
from muai_producers.monitoring.guard import standings

NOW_S = 1_000_000.0
CANDIDATES = st.lists(
    st.builds(
        Candidate,
        st.sampled_from(ORDER),
        st.uuids().map(lambda one: Path(str(one))),
        st.integers(0, 1000),
        st.floats(NOW_S - 20_000, NOW_S),
    ),
    max_size=30,
)


@given(found=CANDIDATES, needed=st.integers(1, 5000))
def test_Given_a_full_disk_Then_old_logs_go_first_the_longest_unused_first_and_no_more_than_needed(
    found: list[Candidate], needed: int
) -> None:
    taken = chosen(found, needed, NOW_S)
    order = [(ORDER.index(one.sort), one.used_s) for one in taken]
    assert order == sorted(order)
    assert sum(one.num_bytes for one in taken[:-1]) < needed or not taken
    in_use = [one for one in taken if one.sort in ("converted models", "leftovers") and NOW_S - one.used_s < 3600]
    assert not in_use
    left = [one for one in found if one not in taken]
    if sum(one.num_bytes for one in taken) < needed:
        assert all(NOW_S - one.used_s < 3600 for one in left), "something could still have gone"


def _file(path: Path, num_bytes: int, age_s: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * num_bytes)
    used_s = path.stat().st_mtime - age_s
    os.utime(path, (used_s, used_s))
    return path


def test_Given_a_full_disk_Then_room_is_made_it_is_said_once_and_told_when_it_is_over(tmp_path: Path) -> None:
    log_file = _file(tmp_path / "logs/worker.log", 10, 0)
    oldest = _file(tmp_path / "logs/worker.log.2", 600, 9000)
    newer = _file(tmp_path / "logs/worker.log.1", 600, 8000)
    idle = _file(tmp_path / "onnx/idle/model.onnx", 500, 9000)
    busy = _file(tmp_path / "onnx/busy/model.onnx", 500, 60)
    kept = _file(tmp_path / "files/file-1", 500, 90_000)
    partial = _file(tmp_path / "files/.partial-1", 500, 9000)
    free = [400]
    alerts: list[str] = []
    places = Places(tmp_path / "logs", tmp_path / "onnx", tmp_path / "files")
    clock = [0.0]
    keeper = DiskKeeper(places, 2000, free_bytes=lambda _: free[0], on_full=alerts.append, monotonic_s=lambda: clock[0])
    assert len(candidates(places)) == 5
    keeper.check()
    assert keeper.is_full
    assert [path.exists() for path in (oldest, newer, partial, idle)] == [False, False, False, True]
    assert all(path.exists() for path in (log_file, busy, kept))
    keeper.check()
    assert not idle.exists()
    keeper.check()
    assert busy.exists()
    assert kept.exists()
    assert len(alerts) == 2, "said once for each time that something was deleted"
    assert "logs" in standings.degraded()
    free[0], clock[0] = 5000, 31.0
    keeper.check()
    assert not keeper.is_full
    assert "logs" not in standings.degraded()


def test_Given_a_place_that_is_not_there_yet_Then_the_disk_that_it_will_be_on_is_looked_at(tmp_path: Path) -> None:
    places = Places(None, tmp_path / "a/b/c", None)
    assert places.all() == (tmp_path,)
    asked: list[Path] = []

    def free_bytes(path: Path) -> int:
        asked.append(path)
        return 10**12

    DiskKeeper(places, 1, free_bytes=free_bytes).check()
    assert asked == [tmp_path]
