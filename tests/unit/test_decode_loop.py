"""Requests that join and leave the running batch of a model, on a decoder whose every answer is known beforehand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tests.requests import a_request

from muai_producers.errors import OutOfMemoryError, RequestCancelledError
from muai_producers.wire import Parameters
from muai_workers.engines.base import Completion
from muai_workers.engines.decode_loop import DecodeLoop, LoopLimits
from muai_workers.engines.padding import PaddedRows
from muai_workers.engines.row import Row, RowContext
from muai_workers.engines.sampling import Sampler
from muai_workers.engines.tokens import TokenRow

VOCABULARY = 1000


class Words:
    """A tokenizer whose text is the tokens' numbers."""

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


CONTEXT = RowContext("m", Words(), frozenset(), {})  # type: ignore[arg-type]


@dataclass
class Kept:
    num_tokens: int
    num_bytes: int = 0

    def first(self, num_tokens: int) -> Kept:
        return Kept(num_tokens)


@dataclass
class Script:
    """How the decoders behave, and what was asked of them."""

    joins: bool = True
    fails: Callable[[list[list[int]]], Exception | None] = lambda _: None
    before_step: Callable[[], object] = lambda: None
    starts: list[list[list[int]]] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)


class ScriptedDecoder:
    """Every next token is the one before plus one."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.joins = script.joins
        self.rows: list[list[int]] = []

    def start(self, rows: PaddedRows) -> torch.Tensor:
        return self.resume(rows, [])

    def resume(self, rows: PaddedRows, kept: Sequence[Any]) -> torch.Tensor:
        texts = [ids[mask == 1].tolist() for ids, mask in zip(rows.ids, rows.mask, strict=True)]
        self.script.starts.append(texts)
        self.rows = texts
        return self._logits()

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        self.script.before_step()
        for row, token in zip(self.rows, tokens, strict=True):
            row.append(token)
        return self._logits()

    def keep(self, rows: Sequence[int]) -> None:
        self.rows = [self.rows[row] for row in rows]

    def join(self, other: ScriptedDecoder) -> None:
        self.rows = self.rows + other.rows

    def kept(self, row: int) -> Kept:
        return Kept(len(self.rows[row]))

    def _logits(self) -> torch.Tensor:
        self.script.widths.append(len(self.rows))
        error = self.script.fails(self.rows)
        if error is not None:
            raise error
        logits = torch.zeros((len(self.rows), VOCABULARY))
        for index, row in enumerate(self.rows):
            logits[index, row[-1] + 1] = 1.0
        return logits


def row(name: str, prompt: Sequence[int], max_new_tokens: int) -> Row:
    parameters = Parameters()
    source = TokenRow(a_request(name), list(prompt))
    return Row(CONTEXT, source, max_new_tokens, Sampler(parameters, prompt), continues=False)


def loop(script: Script, relieve: Callable[[], object] = lambda: None, **limits: int) -> DecodeLoop:
    return DecodeLoop(
        "m",
        lambda: ScriptedDecoder(script),
        pad_id=0,
        padding_side="left",
        limits=LoopLimits(**limits),
        cache=None,
        relieve=relieve,
    )


def texts(events: Sequence[Any]) -> dict[str, str]:
    return {one.request_id: one.output.outputs["text"] for one in events}


def answer(prompt: Sequence[int], max_new_tokens: int) -> str:
    return Words().decode(range(prompt[-1] + 1, prompt[-1] + 1 + max_new_tokens))


class Running:
    """A call of the loop in a thread of its own."""

    def __init__(self, loop: DecodeLoop, rows: Sequence[Row]) -> None:
        self.events: list[Any] = []
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(loop, rows))
        self._thread.start()

    def _run(self, loop: DecodeLoop, rows: Sequence[Row]) -> None:
        try:
            for event in loop.run(rows):
                self.events.append(event)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            self.error = error

    def join(self) -> list[Any]:
        self._thread.join(timeout=30)
        assert not self._thread.is_alive()
        return self.events


class Gate:
    """Holds the loop before a step until the test lets it go: for some steps, or for good."""

    def __init__(self) -> None:
        self.reached = threading.Semaphore(0)
        self.steps = threading.Semaphore(0)
        self.open = threading.Event()

    def __call__(self) -> None:
        self.reached.release()
        if not self.open.is_set():
            assert self.steps.acquire(timeout=30)

    def open_wide(self) -> None:
        self.open.set()
        self.steps.release(1000)


@pytest.mark.parametrize("joins", [True, False])
def test_given_a_long_request_that_runs_then_a_later_short_one_finishes_first(joins: bool) -> None:
    gate = Gate()
    subject = loop(script := Script(joins=joins, before_step=gate))
    long = Running(subject, [row("long", [5], 200)])
    assert gate.reached.acquire(timeout=30)
    short = Running(subject, [row("short", [300], 3)])
    gate.steps.release(100)
    assert texts(short.join()) == {"short": answer([300], 3)}
    assert not long.events
    gate.open_wide()
    assert texts(long.join()) == {"long": answer([5], 200)}
    assert max(script.widths) == (2 if joins else 1)


def test_given_eight_calls_at_once_then_each_gets_its_own_answers_in_shared_steps() -> None:
    gate = Gate()
    subject = loop(script := Script(before_step=gate), max_rows=16)
    calls = [
        Running(subject, [row(f"{call}-{one}", [10 * call + one], 20 + one) for one in range(2)]) for call in range(8)
    ]
    assert gate.reached.acquire(timeout=30)
    gate.open_wide()
    for call, running in enumerate(calls):
        expected = {f"{call}-{one}": answer([10 * call + one], 20 + one) for one in range(2)}
        assert texts(running.join()) == expected
    assert max(script.widths) > 2


@pytest.mark.parametrize(("limits", "most"), [({"max_rows": 3}, 3), ({"max_tokens": 50}, 2)])
def test_more_than_the_limits_allow_waits_in_order(limits: dict[str, int], most: int) -> None:
    script = Script()
    rows = [row(str(index), [index, index + 1], 20) for index in range(8)]
    events = list(loop(script, **limits).run(rows))
    assert [one.request_id for one in events] == [str(index) for index in range(8)]
    assert max(script.widths) == most


def test_a_request_over_the_token_limit_runs_alone() -> None:
    script = Script()
    rows = [row("small", [1], 5), row("huge", [2], 90), row("small too", [3], 5)]
    assert set(texts(list(loop(script, max_tokens=30).run(rows)))) == {"small", "huge", "small too"}
    assert max(script.widths) == 1


def test_given_too_little_memory_then_fewer_run_at_once_and_all_are_answered() -> None:
    relieved: list[None] = []

    def fails(rows: list[list[int]]) -> Exception | None:
        return OutOfMemoryError("too many") if len(rows) > 3 else None

    script = Script(fails=fails)
    rows = [row(str(index), [index], 10) for index in range(8)]
    events = list(loop(script, lambda: relieved.append(None)).run(rows))
    assert texts(events) == {str(index): answer([index], 10) for index in range(8)}
    assert relieved
    assert max(script.widths) == 8


def test_given_one_request_too_large_for_memory_then_it_alone_fails() -> None:
    def fails(rows: list[list[int]]) -> Exception | None:
        return MemoryError() if any(row[0] == 500 for row in rows) else None

    rows = [row("huge", [500], 10), *(row(str(index), [index], 10) for index in range(5))]
    completions = {one.request_id: one for one in loop(Script(fails=fails)).run(rows)}
    assert isinstance(completions.pop("huge").error, OutOfMemoryError)
    assert texts(list(completions.values())) == {str(index): answer([index], 10) for index in range(5)}


def test_given_a_call_that_breaks_the_forward_pass_then_others_in_the_batch_are_answered() -> None:
    gate = Gate()

    def fails(rows: list[list[int]]) -> Exception | None:
        return ValueError("poison") if any(row[-1] == 505 for row in rows) else None

    subject = loop(Script(fails=fails, before_step=gate))
    poisonous = Running(subject, [row("poison", [500], 50)])
    assert gate.reached.acquire(timeout=30)
    innocent = [Running(subject, [row(str(index), [index], 50)]) for index in range(3)]
    gate.open_wide()
    for index, running in enumerate(innocent):
        assert texts(running.join()) == {str(index): answer([index], 50)}
    assert poisonous.join() == []
    assert isinstance(poisonous.error, ValueError)


def test_an_aborted_request_completes_as_cancelled_running_or_waiting() -> None:
    gate = Gate()
    subject = loop(Script(before_step=gate), max_rows=1)
    running = Running(subject, [row(name, [1], 100) for name in ("runs", "waits", "goes on")])
    assert gate.reached.acquire(timeout=30)
    subject.abort(["runs", "waits", "unknown"])
    gate.open_wide()
    completions = {one.request_id: one for one in running.join() if isinstance(one, Completion)}
    assert isinstance(completions["runs"].error, RequestCancelledError)
    assert isinstance(completions["waits"].error, RequestCancelledError)
    assert completions["goes on"].output is not None


def test_given_a_caller_that_goes_away_then_its_rows_leave() -> None:
    gate = Gate()
    subject = loop(script := Script(before_step=gate), max_rows=2)
    abandoned = subject.run([row("first", [1], 1), row("abandoned", [2], 900)])
    assert next(abandoned).request_id == "first"
    abandoned.close()  # type: ignore[attr-defined]
    gate.open_wide()
    assert texts(list(subject.run([row(name, [7], 5) for name in ("a", "b")]))) == {
        name: answer([7], 5) for name in ("a", "b")
    }
    assert len(script.widths) < 100


def test_after_close_the_thread_ends_and_work_is_still_done() -> None:
    subject = loop(Script())
    assert texts(list(subject.run([row("a", [1], 2)]))) == {"a": answer([1], 2)}
    (thread,) = [one for one in threading.enumerate() if one is subject._thread]
    subject.close()
    thread.join(timeout=2)
    assert not thread.is_alive()
    assert texts(list(subject.run([row("b", [1], 2)]))) == {"b": answer([1], 2)}


def test_given_an_error_in_one_of_many_groups_then_nobody_waits_for_ever() -> None:
    script = Script(joins=False, fails=lambda rows: RuntimeError("no") if len(rows) == 2 else None)
    with pytest.raises(RuntimeError, match="no"):
        list(loop(script).run([row("a", [1], 2), row("b", [1], 2)]))
