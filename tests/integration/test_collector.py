"""The collector with a broker that remembers: what it takes in, holds, refuses and sends."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from tests.requests import a_request

from muai_batching.assembler import BatchKey
from muai_batching.collector import Collector
from muai_batching.dispatch import Handle, Passing, Sent
from muai_batching.shards import ShardLeases, shard_of
from muai_config import Settings, build_settings
from muai_producers.fleet import BatchDone, FleetView, WorkerRecord
from muai_producers.messages import request_message
from muai_producers.store import Store
from muai_producers.wire import Batch

MODELS = {
    "m": {"task": "embedding", "source": "hub:none", "engines": ["onnx", "pytorch"]},
    "llm": {"task": "text-generation", "source": "hub:none", "engines": ["pytorch"]},
}


class Broker:
    """A dispatcher that keeps what it is given."""

    def __init__(self) -> None:
        self.sent: list[Batch] = []
        self.dropped: list[Any] = []
        self.lost: set[Any] = set()
        self.passed: list[tuple[str, str]] = []
        self.down = False

    def send(self, batches: Sequence[tuple[Batch, Sequence[Handle]]]) -> list[Sent]:
        if self.down:
            raise RedisConnectionError("gone")
        outcomes = []
        for batch, handles in batches:
            lost = frozenset(handle.tag for handle in handles) & self.lost
            if lost:
                outcomes.append(Sent(lost=frozenset(lost)))
            else:
                self.sent.append(batch)
                outcomes.append(Sent(outstanding=len(self.sent)))
        return outcomes

    def drop(self, handles: Sequence[Handle]) -> None:
        self.dropped += [handle.tag for handle in handles]

    def is_held(self, handle: Handle) -> bool:
        return handle.tag not in self.lost

    def pass_on(self, items: Sequence[Passing]) -> list[Passing]:
        if self.down:
            raise RedisConnectionError("gone")
        self.passed += [(item.queue, item.request.id) for item in items]
        return []


class Message:
    """What the collector reads of a kombu message."""

    def __init__(self, tag: int, headers: Any, body: Any, content_type: str = "application/json") -> None:
        self.channel, self.delivery_tag = None, tag
        self.headers, self.body, self.content_type = headers, body, content_type


class Bench:
    """A collector, its broker and its clocks."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self.store, self.broker, self.revoked = store, Broker(), set[str]()
        self.now_s, self.wall_s, self.tag = 100.0, 1000.0, 0
        self.collector = Collector(
            settings,
            store,
            self.broker,
            is_revoked=self.revoked.__contains__,
            monotonic_s=lambda: self.now_s,
            wall_s=lambda: self.wall_s,
        )

    def fleet(self, *engines: str, **view: Any) -> None:
        workers = tuple(WorkerRecord(name=f"w{n}", engine=engine, slots=1) for n, engine in enumerate(engines))
        self.collector.on_fleet(FleetView(workers=workers, **view))

    def receive(self, request_id: str, **fields: Any) -> int:
        _, headers, body = request_message(a_request(request_id, **fields))
        return self.receive_raw(headers, body)

    def receive_raw(self, headers: Any, body: Any, content_type: str = "application/json") -> int:
        self.tag += 1
        self.collector.on_message(Message(self.tag, headers, body, content_type))
        return self.tag

    def answer(self, request_id: str) -> dict[str, Any]:
        (meta,) = self.store.fetch([request_id])
        assert meta is not None
        return meta


@pytest.fixture
def bench(store: Store) -> Bench:
    return Bench(store, build_settings({"models": MODELS}, {}))


def batch_ids(batch: Batch) -> list[str]:
    return [request.id for request in batch.requests]


def test_given_an_idle_slot_then_what_arrived_together_leaves_together_at_once(bench: Bench) -> None:
    bench.fleet("onnx")
    for number in range(5):
        bench.receive(f"r{number}")
    bench.collector.tick()
    (batch,) = bench.broker.sent
    assert (batch.engine, batch.model, batch.task, batch.chain) == ("onnx", "m", "embedding", ("pytorch",))
    assert batch_ids(batch) == [f"r{number}" for number in range(5)]


def test_given_every_slot_busy_then_requests_wait_and_one_full_batch_leaves_when_one_frees(bench: Bench) -> None:
    bench.fleet("onnx", outstanding={"onnx": 2})
    for number in range(40):
        bench.receive(f"r{number}")
    bench.collector.tick()
    assert bench.broker.sent == []
    bench.collector.sweep()
    assert bench.answer("r0")["status"] == "RECEIVED"
    bench.collector.on_batch_done(BatchDone("onnx", 0))
    bench.collector.tick()
    assert [len(batch.requests) for batch in bench.broker.sent] == [32]


def test_given_a_long_batch_running_then_the_next_is_chosen_when_half_of_it_is_over(bench: Bench) -> None:
    bench.fleet("onnx")
    for _ in range(3):
        bench.collector.on_batch_done(BatchDone("onnx", 0, took_s=10.0, size=32, model="m"))
    for number in range(64):
        bench.receive(f"early-{number}")
    bench.collector.tick()
    assert [len(batch.requests) for batch in bench.broker.sent] == [32]
    for number in range(32):
        bench.receive(f"urgent-{number}", priority=9)
    bench.now_s += 4.5
    assert bench.collector.tick() == pytest.approx(0.5)
    assert len(bench.broker.sent) == 1
    bench.now_s += 0.5
    bench.collector.tick()
    assert set(batch_ids(bench.broker.sent[1])) == {f"urgent-{number}" for number in range(32)}


def test_given_a_long_batch_that_ends_early_then_the_next_leaves_at_once(bench: Bench) -> None:
    bench.fleet("onnx")
    bench.collector.on_batch_done(BatchDone("onnx", 0, took_s=10.0, size=32, model="m"))
    for number in range(64):
        bench.receive(f"r{number}")
    bench.collector.tick()
    bench.collector.on_batch_done(BatchDone("onnx", 0, took_s=0.1, size=32, model="m"))
    bench.collector.tick()
    assert [len(batch.requests) for batch in bench.broker.sent] == [32, 32]


def test_given_no_worker_for_any_engine_then_requests_are_held_until_one_comes(bench: Bench) -> None:
    bench.receive("r")
    bench.collector.tick()
    assert bench.broker.sent == []
    bench.fleet("pytorch")
    bench.collector.tick()
    (batch,) = bench.broker.sent
    assert batch.engine == "pytorch"
    assert [(attempt.engine, attempt.error["code"]) for attempt in batch.attempts] == [("onnx", "engine_unavailable")]


def test_given_an_engine_cooling_down_then_the_next_one_is_used_and_the_reason_told(bench: Bench) -> None:
    bench.fleet("onnx", "pytorch", cooling={("onnx", "m"): "export failed"})
    bench.receive("r")
    bench.collector.tick()
    (batch,) = bench.broker.sent
    assert batch.engine == "pytorch"
    assert "export failed" in batch.attempts[0].error["message"]


def test_given_a_preferred_engine_then_it_goes_first_and_apart_from_others(bench: Bench) -> None:
    bench.fleet("onnx", "pytorch")
    bench.receive("a")
    bench.receive("b", engine_preference=("pytorch", "vllm"))
    bench.collector.tick()
    assert sorted((batch.engine, batch_ids(batch)) for batch in bench.broker.sent) == [
        ("onnx", ["a"]),
        ("pytorch", ["b"]),
    ]


@pytest.mark.parametrize(
    ("fields", "code", "said"),
    [
        ({"model": "mm"}, "model_not_found", "did you mean 'm'"),
        ({"text": " "}, "invalid_request", "empty"),
        ({"task": "chat"}, "unsupported_task", "serves embedding"),
        ({"text": "x" * 200_000}, "input_too_long", "max_batch_tokens"),
        ({"deadline": 999.0}, "deadline_exceeded", "deadline"),
    ],
)
def test_given_a_bad_request_among_good_ones_then_its_sender_alone_gets_a_clear_error(
    bench: Bench, fields: dict[str, Any], code: str, said: str
) -> None:
    bench.fleet("onnx")
    bench.receive("before")
    tag = bench.receive("bad", **fields)
    bench.receive("after")
    bench.collector.tick()
    bench.collector.tick()
    meta = bench.answer("bad")
    assert (meta["status"], meta["result"]["code"]) == ("FAILURE", code)
    assert said in meta["result"]["exc_message"][0]
    assert bench.broker.dropped == [tag]
    assert sorted(request_id for batch in bench.broker.sent for request_id in batch_ids(batch)) == ["after", "before"]


GOOD_HEADERS = {"task": "muai.infer", "id": "x"}


@pytest.mark.parametrize(
    ("headers", "body", "content_type", "said"),
    [
        (GOOD_HEADERS, base64.b64encode(b"\x80\x04."), "application/x-python-serialize", "refused"),
        (GOOD_HEADERS, b"{not json", "application/json", "decoded"),
        (GOOD_HEADERS, b'{"a": 1}', "application/json", "args, kwargs, embed"),
        (GOOD_HEADERS, b'[["m"], {}, {}]', "application/json", "keyword arguments only"),
        ({**GOOD_HEADERS, "expires": "soon"}, b'[[], {"model": "m", "inputs": {}}, {}]', "application/json", "ISO"),
    ],
)
def test_given_a_message_that_is_no_request_then_it_is_answered_and_kept_as_a_dead_letter(
    bench: Bench, headers: Any, body: bytes, content_type: str, said: str
) -> None:
    tag = bench.receive_raw(headers, body, content_type)
    bench.collector.tick()
    meta = bench.answer("x")
    assert meta["result"]["code"] == "malformed_message"
    assert said in meta["result"]["exc_message"][0]
    assert bench.broker.dropped == [tag]
    assert bench.store.client.xlen(bench.store.keys.dead) == 1  # type: ignore[attr-defined]


def test_given_a_plain_celery_message_then_expires_becomes_the_deadline_and_msgpack_is_read(bench: Bench) -> None:
    bench.fleet("onnx")
    kwargs = {"model": "m", "inputs": {"text": "hello"}}
    headers = {**GOOD_HEADERS, "expires": "1970-01-01T00:20:00+00:00"}
    bench.receive_raw(headers, msgspec.msgpack.encode([[], kwargs, None]), "application/x-msgpack")
    bench.collector.tick()
    (batch,) = bench.broker.sent
    assert batch.requests[0].deadline == 1200.0
    assert batch.requests[0].id == "x"


def test_given_lost_claims_then_the_batch_is_not_sent_and_the_rest_goes_again(bench: Bench) -> None:
    bench.fleet("onnx")
    bench.broker.lost = {bench.receive("gone")}
    bench.receive("kept")
    bench.collector.tick()
    bench.collector.tick()
    assert [batch_ids(batch) for batch in bench.broker.sent] == [["kept"]]


def test_given_a_collector_that_was_given_up_then_one_refused_batch_ends_all_that_it_held(bench: Bench) -> None:
    bench.fleet("onnx")
    bench.broker.lost = {bench.receive(f"gone {number}") for number in range(100)}
    kept = bench.receive("kept")
    delay_s = bench.collector.tick()
    assert delay_s == 0.0, "the slots that stayed free are filled at once"
    assert bench.collector.assembler.num_requests == (0 if bench.broker.sent else 1), "only what is held is left"
    bench.collector.tick()
    assert [batch_ids(batch) for batch in bench.broker.sent] == [["kept"]]
    assert kept not in bench.broker.lost


def test_given_the_broker_is_away_then_everything_is_held_and_sent_when_it_is_back(bench: Bench) -> None:
    bench.fleet("onnx")
    bench.receive("r")
    bench.broker.down = True
    delay_s = bench.collector.tick()
    assert delay_s is not None
    assert delay_s > 0
    bench.broker.down = False
    bench.collector.tick()
    assert [batch_ids(batch) for batch in bench.broker.sent] == [["r"]]


def test_given_expiry_or_revocation_while_waiting_then_the_sweep_answers(bench: Bench) -> None:
    bench.receive("late", deadline=1001.0)
    bench.receive("unwanted")
    bench.receive("fine")
    bench.collector.tick()
    bench.wall_s = 1002.0
    bench.revoked.add("unwanted")
    bench.collector.sweep()
    bench.collector.tick()
    assert bench.answer("late")["result"]["code"] == "deadline_exceeded"
    assert bench.answer("unwanted")["status"] == "REVOKED"
    assert bench.collector.assembler.num_requests == 1


def test_given_a_lost_connection_then_nothing_of_what_was_held_is_sent(bench: Bench) -> None:
    bench.receive("r")
    bench.collector.forget_all()
    bench.fleet("onnx")
    bench.collector.tick()
    assert bench.broker.sent == []


def test_given_a_latency_target_then_batches_shrink_to_what_the_fitted_engine_can_do_in_time(store: Store) -> None:
    document = {"models": MODELS, "optimization": {"batcher": {"latency_target_ms": 100}}}
    bench = Bench(store, build_settings(document, {}))
    bench.fleet("onnx")
    for size in (1, 4, 8, 16, 32, 2, 12):
        bench.collector.on_batch_done(BatchDone("onnx", 0, took_s=0.010 + 0.004 * size, size=size, model="m"))
    for number in range(40):
        bench.receive(f"r{number}")
    bench.collector.tick()
    assert [len(batch.requests) for batch in bench.broker.sent] == [10, 10]


def test_given_shards_then_a_collector_keeps_its_own_requests_and_passes_the_others_on(store: Store) -> None:
    bench = Bench(store, build_settings({"models": MODELS, "queue": {"collector_shards": 8}}, {}))
    bench.fleet("onnx", "pytorch")
    mine = shard_of(BatchKey("m", "embedding", ("onnx", "pytorch")), 8)
    theirs = shard_of(BatchKey("llm", "text-generation", ("pytorch",)), 8)
    assert mine != theirs
    bench.collector.on_shards(frozenset({mine}))
    bench.receive("a")
    bench.receive("b", model="llm")
    bench.collector.tick()
    assert [batch_ids(batch) for batch in bench.broker.sent] == [["a"]]
    assert bench.broker.passed == [(f"inference.shard.{theirs}", "b")]


def test_given_a_shard_given_up_then_what_waits_of_it_is_passed_on_even_if_the_broker_was_away(store: Store) -> None:
    bench = Bench(store, build_settings({"models": MODELS, "queue": {"collector_shards": 8}}, {}))
    for number in range(600):
        bench.receive(f"r{number}")
    bench.collector.on_shards(frozenset())
    bench.broker.down = True
    bench.collector.tick()
    bench.broker.down = False
    bench.collector.tick()
    assert sorted(request_id for _, request_id in bench.broker.passed) == sorted(f"r{n}" for n in range(600))
    assert bench.collector.assembler.num_requests == 0


def test_given_collectors_that_come_and_go_then_every_shard_has_one_holder_and_shares_are_fair(store: Store) -> None:
    leases = {name: ShardLeases(store, name, 8, lease_s=60.0) for name in ("a", "b", "c")}
    assert leases["a"].claim(1) == frozenset(range(8))
    assert len(leases["b"].claim(2)) == 0
    kept = leases["a"].claim(2)
    taken = leases["b"].claim(2)
    assert (len(kept), kept | taken, kept & taken) == (4, frozenset(range(8)), frozenset())
    leases["a"].release()
    assert leases["b"].claim(1) == frozenset(range(8))
