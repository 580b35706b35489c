"""How often a client that waits looks at all that is open: often while nothing is heard, seldom while notices come."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from muai_producers import listening
from muai_producers.listening import ResultListener

CHANNEL, LOOK_S, BUSY_LOOK_S = "replies", 0.1, 0.8


class Subscription:
    """Notices of requests that nobody asked for, each `pace_s`; none where that is None."""

    def __init__(self, pace_s: float | None) -> None:
        self._pace_s = pace_s

    def subscribe(self, *channels: str) -> None: ...

    def close(self) -> None: ...

    def get_message(self, timeout: float) -> dict[str, Any] | None:
        time.sleep(min(timeout, 0.02) if self._pace_s is None else self._pace_s)
        return None if self._pace_s is None else {"channel": CHANNEL.encode(), "data": b"of-another"}


class Client:
    def __init__(self, pace_s: float | None) -> None:
        self._pace_s = pace_s

    def pubsub(self, **_: bool) -> Subscription:
        return Subscription(self._pace_s)


class States:
    """A store whose requests are never finished, and that counts the looks."""

    def __init__(self) -> None:
        self.looked_s: list[float] = []
        self.enough = threading.Event()

    def states(self, ids: list[str]) -> list[None]:
        self.looked_s.append(time.monotonic())
        if len(self.looked_s) >= 3:
            self.enough.set()
        return [None] * len(ids)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "RECHECK_S", LOOK_S)
    monkeypatch.setattr(listening, "BUSY_RECHECK_S", BUSY_LOOK_S)


@pytest.mark.parametrize(("pace_s", "apart_s"), [(None, LOOK_S), (0.01, BUSY_LOOK_S)])
def test_given_an_open_request_then_it_is_looked_at_though_nobody_tells_of_it(
    pace_s: float | None, apart_s: float
) -> None:
    states = States()
    listener = ResultListener(Client(pace_s), states, CHANNEL)  # type: ignore[arg-type]
    try:
        listener.watch(["one"], lambda _: None)
        assert states.enough.wait(20.0)
    finally:
        listener.close()
    first, second, third = states.looked_s[:3]
    assert third - second >= apart_s
    assert second - first >= apart_s


def test_given_a_notice_that_carries_an_answer_then_it_is_kept_once_for_whoever_waits() -> None:
    listener = ResultListener(Client(None), States(), CHANNEL)  # type: ignore[arg-type]
    told: list[list[str]] = []
    watch = listener.watch(["a"], told.append)
    try:
        listener._heard(notice(b'a {"status":"SUCCESS","result":{"x":1}}\nb {"status":"SUCCESS"}'))
        assert told == [["a"]]
        assert listener.take_carried("a") == b'{"status":"SUCCESS","result":{"x":1}}'
        assert listener.take_carried("a") is None
        assert listener.take_carried("b") is None  # nobody waits for it
    finally:
        watch.close()
        listener.close()


def test_given_answers_that_nobody_takes_then_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "MAX_CARRIED", 2)
    listener = ResultListener(Client(None), States(), CHANNEL)  # type: ignore[arg-type]
    watch = listener.watch(["a", "b", "c"], lambda ids: None)
    try:
        for name in (b"a", b"b", b"c"):
            listener._heard(notice(name + b' {"status":"SUCCESS"}'))
        assert [listener.take_carried(name) is not None for name in "abc"] == [False, True, True]
    finally:
        watch.close()
        listener.close()


def notice(data: bytes) -> dict[str, Any]:
    return {"channel": CHANNEL.encode(), "data": data}
