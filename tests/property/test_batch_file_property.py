"""A batch from a file whose runners die at any step: it ends, and each line is answered once."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.transport_support import OwnRedis

from muai_config import Settings, build_settings
from muai_producers.batches.lines import InputCheck
from muai_producers.batches.records import BatchBody, BatchRecord
from muai_producers.batches.store import BatchStore, Versioned
from muai_producers.errors import InvalidRequestError, QueueFullError
from muai_producers.files.folder import FileFolder
from muai_producers.files.shelf import FileShelf
from muai_producers.store import Limits, Store, failure_answer, success_answer
from muai_producers.submit import RedisSubmitter
from muai_producers.wire import InferenceRequest, InferenceResult
from muai_workers.control import batches as control_batches
from muai_workers.control.batches import BatchRunner
from muai_workers.control.slack import LEAST_SHARE, Slack

EMBED = "/v1/embeddings"


class KilledError(Exception):
    """The process dies here."""


class World:
    """What outlives a runner: state store, folder, queue; and chance, which kills runners and serves requests."""

    def __init__(self, redis: OwnRedis, folder: Path, seed: int, capacity: int) -> None:
        redis.client.flushall()
        self.chance = random.Random(seed)
        self.settings: Settings = build_settings(
            {
                "queue": {"broker_url": redis.url},
                "gateway": {"batches": {"max_in_flight": 5, "capacity_share": 1.0}},
                "monitoring": {"server": {"queue_capacity": capacity}},
                "models": {"vectors": {"task": "embedding", "source": "hub:none", "engines": ["fake"]}},
            },
            {},
        )
        self.store = Store(redis.client)
        self.folder = FileFolder(folder)
        self.queue: dict[str, InferenceRequest] = {}
        self._submitter = RedisSubmitter(self.store, max_payload_bytes=1_000_000)

    def submit(self, requests: Sequence[InferenceRequest], limits: Limits) -> list[str]:
        try:
            ids = self._submitter.submit(requests, limits)
        except QueueFullError as full:
            self._take([request for request in requests if request.id in full.details["accepted"]])
            raise
        self._take(requests)
        if self.chance.random() < 0.1:
            raise KilledError
        return ids

    def _take(self, requests: Sequence[InferenceRequest]) -> None:
        self.queue |= {request.id: request for request in requests if request.id not in self.queue}

    def serve(self) -> None:
        for request_id in [one for one in self.queue if self.chance.random() < 0.6]:
            request = self.queue.pop(request_id)
            if "BAD" in request.inputs["text"]:
                answer = failure_answer(request.id, InvalidRequestError("bad"), tenant=request.tenant)
            else:
                result = InferenceResult(
                    outputs={"embedding": [1.0]},
                    engine_used="fake",
                    latency_ms=1.0,
                    batch_size=1,
                    cache_hit=False,
                    metadata={"batch_id": request.id, "inference_ms": 0.0, "usage": {"input_tokens": 1}},
                )
                answer = success_answer(request, result)
            self.store.answer([answer])

    def new_runner(self) -> BatchRunner:
        runner = BatchRunner(self.settings, self.store, self.submit, self.folder)
        save = runner.batches.save

        def save_or_die(record: BatchRecord, found: Versioned) -> bool:
            if self.chance.random() < 0.15:
                raise KilledError
            saved = save(record, found)
            if self.chance.random() < 0.1:
                raise KilledError
            return saved

        runner.batches.save = save_or_die  # type: ignore[method-assign]
        return runner


def make_batch(world: World, lines: Sequence[str]) -> BatchStore:
    shelf = FileShelf(world.store, world.folder, world.settings.gateway.files)
    content = "\n".join(lines).encode()
    record = shelf.new_file("default", "x.jsonl", "batch", len(content))
    with world.folder.writing() as (file, partial):
        file.write(content)
        world.folder.keep(file, partial, record.file.id)
    shelf.put(record)
    batches = BatchStore(world.store, 3600)
    now_s = int(time.time())
    body = BatchBody(input_file_id=record.file.id, endpoint=EMBED)
    batches.create(
        BatchRecord(id="batch_1", tenant="default", body=body, created_at=now_s, expires_at=now_s + 3600), max_open=10
    )
    return batches


def answers(world: World, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    return [json.loads(line) for line in world.folder.content(file_id).read_text().splitlines()]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(st.sampled_from(["text", "BAD", "two"]), min_size=1, max_size=25),
    seed=st.integers(0, 2**32),
    capacity=st.integers(1, 10),
    cancel_after=st.none() | st.integers(0, 30),
)
def test_given_runners_that_die_at_any_step_then_the_batch_ends_and_each_line_is_answered_once(
    clean_redis: OwnRedis,
    tmp_path: Path,
    lines: list[str],
    seed: int,
    capacity: int,
    cancel_after: int | None,
) -> None:
    world = World(clean_redis, tmp_path / str(seed), seed, capacity)
    bodies = [{"model": "vectors", "input": ["a", "b"] if kind == "two" else kind} for kind in lines]
    batches = make_batch(
        world,
        [
            json.dumps({"custom_id": str(number), "method": "POST", "url": EMBED, "body": body})
            for number, body in enumerate(bodies)
        ],
    )
    runners = [world.new_runner(), world.new_runner()]
    for turn in range(2000):
        if turn == cancel_after:
            batches.cancel("batch_1")
        place = world.chance.randrange(2)
        try:
            runners[place].step("batch_1")
        except KilledError:
            runners[place] = world.new_runner()
        world.serve()
        if batches.get("batch_1").record.ended:
            break
    ended = batches.get("batch_1").record
    assert ended.status in (("completed",) if cancel_after is None else ("completed", "cancelled"))
    good, bad = answers(world, ended.output_file_id), answers(world, ended.error_file_id)
    assert Counter(one["custom_id"] for one in (*good, *bad)) == Counter(str(number) for number in range(len(lines)))
    assert (ended.total, ended.completed, ended.failed) == (len(lines), len(good), len(bad))
    if ended.status == "completed":
        assert {int(one["custom_id"]) for one in bad} == {n for n, kind in enumerate(lines) if kind == "BAD"}
    for one in good:
        size = len(one["response"]["body"]["data"])
        assert size == (2 if lines[int(one["custom_id"])] == "two" else 1)
    # What is left in the queue when a batch is cancelled was sent by a runner that died before it noted it.
    assert ended.status == "cancelled" or world.store.in_flight() == 0
    assert batches.open_ids() == []


def test_given_a_batch_that_another_runner_ends_then_its_window_hurries_nobody_any_more(
    clean_redis: OwnRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Slack] = []

    class Kept(Slack):
        def __init__(self, busy_share: float, max_in_flight: int) -> None:
            super().__init__(busy_share, max_in_flight)
            made.append(self)

    monkeypatch.setattr(control_batches, "Slack", Kept)
    world = World(clean_redis, tmp_path, 0, 100)
    monkeypatch.setattr(world.chance, "random", lambda: 0.5)  # nobody dies, everything is served
    line = {"method": "POST", "url": EMBED, "body": {"model": "vectors", "input": "text"}}
    batches = make_batch(world, [json.dumps({"custom_id": str(number), **line}) for number in range(40)])
    runner, other = world.new_runner(), world.new_runner()
    late_s = batches.get("batch_1").record.expires_at - 1.0
    runner.step("batch_1")
    runner.step("batch_1", late_s)
    made[0].ended([_slow_result()], 0.0)
    assert made[0].share == 0.2, "40 lines of 0.1 s in the last second of their window"
    while not batches.get("batch_1").record.ended:
        other.step("batch_1")
        world.serve()
    record = msgspec.structs.replace(batches.get("batch_1").record, id="batch_2", status="validating", total=0)
    batches.create(msgspec.structs.replace(record, completed=0, next_offset=0, next_line=1, segments=()), max_open=10)
    runner.step("batch_2")
    runner.step("batch_2")
    assert made[0].share == LEAST_SHARE


def _slow_result() -> InferenceResult:
    metadata = {"batch_id": "slow", "inference_ms": 100.0, "model": "vectors"}
    return InferenceResult(
        outputs={}, engine_used="fake", latency_ms=100.0, batch_size=1, cache_hit=False, metadata=metadata
    )


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(["good", "again", "empty", "broken", "other", "long"]), max_size=30), st.integers(1, 20)
)
def test_given_any_lines_then_each_problem_is_named_with_its_line_and_good_files_have_none(
    kinds: list[str], max_lines: int
) -> None:
    check = InputCheck(EMBED, max_lines, 300)
    expected: list[tuple[str, int | None]] = []
    seen_again = False
    num_lines = 0
    for number, kind in enumerate(kinds, 1):
        custom_id = "same" if kind == "again" else f"line-{number}"
        url = "/v1/completions" if kind == "other" else EMBED
        raw = json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": {}}).encode()
        raw = {"empty": b"  ", "broken": b"{", "long": b"x" * 301}.get(kind, raw)
        if kind != "empty":
            num_lines += 1
            if num_lines > max_lines:
                expected.append(("too_many_requests", None))
            elif kind in ("broken", "other"):
                expected.append(("invalid_line", number))
            elif kind == "long":
                expected.append(("line_too_long", number))
            elif kind == "again" and seen_again:
                expected.append(("duplicate_custom_id", number))
            seen_again = seen_again or kind == "again"
        if not check.see(raw, number):
            break
    problems = check.end()
    if not num_lines:
        expected.append(("empty_file", None))
    assert [(one.code, one.line) for one in problems] == expected
    assert all(one.message for one in problems)


def test_given_a_full_queue_then_lines_wait_for_room(clean_redis: OwnRedis, tmp_path: Path) -> None:
    world = World(clean_redis, tmp_path, 1, capacity=1)

    def full(requests: Sequence[InferenceRequest], limits: Limits) -> list[str]:
        raise QueueFullError("full", {"limit": "queue_capacity", "allowed": 1, "in_flight": 1, "retry_after_s": 1.0})

    batches = make_batch(
        world,
        ['{"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {"model": "vectors", "input": "x"}}'],
    )
    runner = BatchRunner(world.settings, world.store, full, world.folder)
    assert runner.step("batch_1")  # checked
    assert not runner.step("batch_1")
    record = batches.get("batch_1").record
    assert (record.status, record.open_lines, record.next_line) == ("in_progress", (), 1)
    assert pytest.approx(record.completed) == 0
