"""What the console makes of what it reads, and how it writes it for people."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from tests.requests import a_request

from muai_config import build_settings
from muai_producers.errors import EnginesExhaustedError, ModelLoadError
from muai_producers.fleet import FleetView, WorkerRecord
from muai_producers.gateway.console import telling
from muai_producers.gateway.console.letters import Deed
from muai_producers.gateway.console.pages import wants_html
from muai_producers.gateway.console.presenting import clock, duration
from muai_producers.gateway.failures import ForbiddenError
from muai_producers.gateway.sessions import check_same_origin, is_token, new_session, session_in, spoken_for, token_of
from muai_producers.queue_depths import QueueDepth
from muai_producers.store import failure_answer, success_answer
from muai_producers.vectors import as_bytes, to_base64
from muai_producers.wire import InferenceResult
from muai_workers.up.stack import gateway_url


def a_meta(**changes: Any) -> bytes:
    metadata = {
        "model": "m",
        "task": "embedding",
        "queue_ms": 2.0,
        "batching_ms": 40.0,
        "dispatch_ms": 3.0,
        "inference_ms": 50.0,
        "usage": {"input_tokens": 7, "output_tokens": 0},
        "attempts": [{"engine": "vllm", "error": ModelLoadError("no file").to_wire()}],
        "worker": "w1",
        "batch_id": "b1",
    }
    fields: dict[str, Any] = {
        "outputs": {"embedding": [0.5] * 10},
        "engine_used": "onnx",
        "latency_ms": 100.0,
        "batch_size": 4,
        "cache_hit": False,
        "metadata": metadata,
    }
    return success_answer(a_request("r", tenant="acme"), InferenceResult(**{**fields, **changes})).meta


def test_Given_an_embedding_in_base64_Then_its_numbers_are_shown() -> None:
    text = to_base64(as_bytes([0.5, -1.0]))
    assert telling.preview(json.dumps({"embedding": text}).encode()) == "2 numbers: 0.5000, -1.0000"


def test_Given_a_result_Then_its_way_has_every_step_and_the_rest_is_the_answers() -> None:
    way = telling.request_way("r", a_meta(), None)
    assert [(step.name, step.started_ms, step.took_ms) for step in way.steps] == [
        ("queue", 0.0, 2.0),
        ("batching", 2.0, 40.0),
        ("dispatch", 42.0, 3.0),
        ("inference", 45.0, 50.0),
        ("answer", 95.0, 5.0),
    ]
    assert (way.tenant, way.model, way.engine, way.batch_size, way.input_tokens) == ("acme", "m", "onnx", 4, 7)
    assert [(one.engine, one.code) for one in way.attempts] == [("vllm", "model_load_failed")]
    assert way.preview == f"10 numbers: {', '.join(['0.5000'] * 8)}, …"
    assert way.finished_at is not None
    assert way.submitted_at == pytest.approx(way.finished_at - 0.1)


def test_Given_clocks_that_disagree_Then_no_step_is_negative() -> None:
    metadata = {"queue_ms": 80.0, "batching_ms": 0.0, "dispatch_ms": 0.0, "inference_ms": 90.0}
    steps = telling.request_way("r", a_meta(metadata=metadata), None).steps
    assert [step.took_ms for step in steps] == [80.0, 0.0, 0.0, 90.0, 0.0]


def test_Given_a_failure_or_a_request_under_way_or_what_another_program_wrote_Then_what_is_known_is_told() -> None:
    attempts = [{"engine": "onnx", "error": {"code": "x", "message": "y"}}, "nonsense", {"engine": "odd", "error": 3}]
    failed = telling.request_way(
        "r", failure_answer("r", EnginesExhaustedError("nobody", {"attempts": attempts}), tenant="t").meta, None
    )
    assert (failed.state, failed.error_code, failed.error_message) == ("FAILURE", "engines_exhausted", "nobody")
    assert [(one.engine, one.code) for one in failed.attempts] == [("onnx", "x"), ("odd", "")]
    waiting = telling.request_way("r", None, telling.InFlight("t", "m", 12.0))
    assert (waiting.state, waiting.tenant, waiting.model, waiting.submitted_at) == ("PENDING", "t", "m", 12.0)
    started = msgspec.json.encode({"status": "STARTED", "result": {"engine": "onnx", "worker": "w1", "batch_id": "b"}})
    assert telling.request_way("r", started, None).worker == "w1"
    for result in (5, "text", [1], {"latency_ms": "soon"}, None):
        foreign = msgspec.json.encode({"status": "SUCCESS", "result": result, "date_done": "yesterday"})
        assert telling.request_way("r", foreign, None).state == "SUCCESS"


def test_Given_a_fleet_Then_engines_with_a_use_are_told_and_what_cools_down_with_its_time() -> None:
    models = {"m": {"task": "embedding", "source": "hub:none", "engines": ["onnx", "pytorch"]}}
    view = FleetView(
        workers=(WorkerRecord(name="w", engine="onnx", slots=2),),
        cooling={("onnx", "m"): "out of memory"},
        cooling_until={("onnx", "m"): 130.0},
        outstanding={"onnx": 3},
    )
    depths = {"inference.low": QueueDepth(2, oldest_at=90.0), "engine.onnx": QueueDepth(1)}
    fleet = telling.fleet_state(build_settings({"models": models}, {}), view, depths, None, 100.0)
    onnx, pytorch = sorted(fleet.engines, key=lambda engine: engine.name)
    assert (onnx.state, onnx.slots, onnx.outstanding, onnx.cooling[0].seconds_left) == ("cooling", 2, 3, 30.0)
    assert (pytorch.state, pytorch.models) == ("absent", ["m"])
    low, batches = fleet.queues
    assert (low.priority, low.oldest_age_s, batches.holds, batches.oldest_age_s) == ("low", 10.0, "batches", None)
    assert fleet.dead_letters is None


@pytest.mark.parametrize(
    ("value_ms", "text"),
    [
        (None, "—"),
        (0.04, "0.0 ms"),
        (9.94, "9.9 ms"),
        (42.4, "42 ms"),
        (1240.0, "1.2 s"),
        (59_000.0, "59 s"),
        (125_000.0, "2 min 5 s"),
        (11_520_000.0, "3 h 12 min"),
        (180_000_000.0, "2 d 2 h"),
    ],
)
def test_durations_are_written_in_the_unit_that_suits_them(value_ms: float | None, text: str) -> None:
    assert duration(value_ms) == text


def test_times_are_written_in_utc_for_the_script_to_localise() -> None:
    assert str(clock(0.5)) == '<time datetime="1970-01-01T00:00:00.500+00:00" data-clock>00:00:00 UTC</time>'


@pytest.mark.parametrize(
    ("accept", "verdict"),
    [
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", True),
        ("TEXT/HTML;q=0.8", True),
        ("*/*", False),
        ("application/json", False),
        ("", False),
    ],
)
def test_only_who_names_html_gets_a_page(accept: str, verdict: bool) -> None:
    assert wants_html(accept) is verdict


def test_a_deed_survives_its_way_through_an_address() -> None:
    deed = Deed(replayed=3, refused=1, left=0)
    query = {name: str(value) for name, value in deed.to_query().items()}
    assert Deed.from_query(query) == deed
    assert Deed.from_query({}) is None
    assert Deed.from_query({"replayed": "<b>", "purged": "-1", "left": "²"}) is None


def test_a_session_speaks_only_with_its_own_pages_token() -> None:
    session, other = new_session(), new_session()
    cookie = (b"cookie", f"a=b; muai_console={session}; c=d".encode())
    assert session_in([cookie]) == session
    assert session_in([(b"cookie", b"muai_console=short")]) is None
    assert spoken_for([cookie, (b"x-muai-console", token_of(session).encode())]) == session
    for headers in ([cookie], [cookie, (b"x-muai-console", token_of(other).encode())], [(b"x-muai-console", b"x")]):
        assert spoken_for(headers) is None
    assert is_token(session, token_of(session))
    assert not is_token(session, "é")


@pytest.mark.parametrize(
    ("headers", "verdict"),
    [
        ({b"sec-fetch-site": b"same-origin"}, True),
        ({b"sec-fetch-site": b"none"}, True),
        ({b"sec-fetch-site": b"same-site"}, False),
        ({b"sec-fetch-site": b"cross-site", b"origin": b"http://a:1", b"host": b"a:1"}, False),
        ({b"origin": b"http://a:1", b"host": b"a:1"}, True),
        ({b"origin": b"http://a:2", b"host": b"a:1"}, False),
        ({b"origin": b"null", b"host": b"a:1"}, False),
        ({b"host": b"a:1"}, False),
    ],
)
def test_what_another_sites_page_sends_is_refused(headers: dict[bytes, bytes], verdict: bool) -> None:
    if verdict:
        check_same_origin(headers.items())
    else:
        with pytest.raises(ForbiddenError):
            check_same_origin(headers.items())


@pytest.mark.parametrize(
    ("server", "host", "url"),
    [
        ({}, "127.0.0.1", "http://127.0.0.1:8000/"),
        ({"host": "0.0.0.0", "port": 9000}, None, "http://127.0.0.1:9000/"),
        ({"host": "gpu-7"}, None, "http://gpu-7:8000/"),
        ({"host": "::1"}, None, "http://[::1]:8000/"),
    ],
)
def test_muai_up_tells_an_address_that_a_browser_can_open(server: dict[str, Any], host: str | None, url: str) -> None:
    assert gateway_url(build_settings({"monitoring": {"server": server}}, {}), host) == url
