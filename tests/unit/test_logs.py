"""Logs by themselves: what a line says, in both forms, and what it never says."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from muai_config import build_settings
from muai_producers.errors import InferenceFailedError
from muai_producers.logs import about_batch, about_request, log_context
from muai_producers.logs.contents import tell_contents
from muai_producers.logs.formats import ConsoleFormatter, JsonFormatter
from muai_producers.logs.redaction import Redactor, passwords_of, withhold
from muai_producers.logs.setup import set_up_logging
from muai_producers.tracing.context import root_trace
from muai_producers.wire import Batch, InferenceRequest
from muai_workers.up.console import JsonConsole

PROMPT = "my mother's maiden name is Wollstonecraft"
REQUEST = InferenceRequest(id="r1", model="m", inputs={"prompt": PROMPT}, tenant="shop", trace=root_trace("r1"))
log = logging.getLogger("test.logs")


@pytest.fixture
def lines() -> Iterator[list[dict[str, Any]]]:
    """What is logged, read back from JSON."""
    found: list[dict[str, Any]] = []
    formatter = JsonFormatter(Redactor(["hunter22"]), "worker-1")

    class Reading(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(json.loads(formatter.format(record)))

    handler = Reading()
    log.addHandler(handler)
    log.setLevel("DEBUG")
    yield found
    log.removeHandler(handler)


def test_Given_a_request_Then_its_lines_say_whose_it_is(lines: list[dict[str, Any]]) -> None:
    with about_request(REQUEST, engine="onnx"):
        log.info("running")
    log.info("after")
    wanted = {"request_id": "r1", "model_name": "m", "tenant": "shop", "engine": "onnx", "process": "worker-1"}
    assert wanted.items() <= lines[0].items()
    assert lines[0]["trace_id"] == root_trace("r1")["traceparent"][3:35]
    assert "request_id" not in lines[1]


def test_Given_a_batch_Then_its_lines_say_its_id_and_size_and_of_one_request_whose_it_is(
    lines: list[dict[str, Any]],
) -> None:
    def batch(*requests: InferenceRequest) -> Batch:
        return Batch(id="b1", engine="onnx", model="m", task="chat", requests=list(requests), chain=())

    with about_batch(batch(REQUEST, REQUEST)):
        log.info("running")
    with about_batch(batch(REQUEST)):
        log.info("running")
    assert {"batch_id": "b1", "batch_size": 2, "engine": "onnx", "model_name": "m"}.items() <= lines[0].items()
    assert "request_id" not in lines[0]
    assert {"batch_id": "b1", "request_id": "r1", "tenant": "shop"}.items() <= lines[1].items()


def test_Given_another_thread_Then_it_has_a_context_of_its_own(lines: list[dict[str, Any]]) -> None:
    with about_request(REQUEST), ThreadPoolExecutor(1) as pool:
        pool.submit(log.info, "elsewhere").result()
    assert "request_id" not in lines[0]


def test_Given_an_error_as_argument_or_in_flight_Then_type_message_and_stack_are_fields(
    lines: list[dict[str, Any]],
) -> None:
    try:
        raise InferenceFailedError("no memory")
    except InferenceFailedError as error:
        log.warning("request failed: %s", error)
        log.exception("again")
    for line in lines:
        assert line["error_type"] == "InferenceFailedError"
        assert line["error_code"] == "inference_failed"
        assert "no memory" in line["error_message"]
        assert "test_logs.py" in line["stack_trace"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("redis://:hunter2@h:6379/0 gone", "redis://:***@h:6379/0 gone"),
        ("amqps://shop:p%40ss@h// gone", "amqps://shop:***@h// gone"),
        ("Authorization: Bearer abcdef123456", "Authorization: Bearer ***"),
        (f"key muai_0123456789ab_{'x' * 43} is wrong", "key muai_0123456789ab_*** is wrong"),
        ('{"password": "correct horse"}', '{"password": "*** horse"}'),
        ("api_key=sk-verysecret;", "api_key=***;"),
        ("token count: 128 tokens", "token count: 128 tokens"),
        ("http://h:8000/v1/inference?wait=3", "http://h:8000/v1/inference?wait=3"),
        ("password hunter22 as it is", "password *** as it is"),
    ],
)
def test_Given_a_secret_Then_it_is_hidden_and_the_rest_stays(text: str, shown: str) -> None:
    assert Redactor(["hunter22"]).clean(text) == shown


def test_Given_addresses_Then_their_passwords_are_known_in_both_spellings() -> None:
    assert passwords_of(["amqp://u:a%2Fbcd@h", None, "redis://h", "sentinel://:one1@a;sentinel://:two2@b"]) == (
        "a%2Fbcd",
        "a/bcd",
        "one1",
        "two2",
    )


@pytest.mark.parametrize(
    "said",
    [
        f"cannot read {PROMPT!r}",
        f"cannot read {PROMPT[:25]}…",
        f"twice {PROMPT} and {PROMPT}",
        "escaped " + json.dumps(PROMPT),
    ],
)
def test_Given_a_library_that_quotes_its_input_Then_the_quotation_is_withheld(
    lines: list[dict[str, Any]], said: str
) -> None:
    with about_request(REQUEST):
        log.error("it said: %s", ValueError(said))
    assert "maiden" not in json.dumps(lines)
    assert "[withheld]" in lines[0]["message"]


def test_Given_what_is_in_any_sentence_Then_it_is_not_taken_for_a_quotation() -> None:
    assert withhold("the batch failed: out of memory", ["the", "out of", "a"]) == "the batch failed: out of memory"
    assert withhold("cannot read 'hunter'", ["hunter"]) == "cannot read '[withheld]'"


def test_Given_that_contents_are_asked_for_Then_they_are_there_and_secrets_still_are_not() -> None:
    record = logging.makeLogRecord({"msg": f"{PROMPT} redis://:hunter2@h", "levelname": "INFO"})
    with about_request(REQUEST):
        line = JsonFormatter(Redactor(contents=True), "p").format(record)
    assert "maiden" in line
    assert "hunter2" not in line


def test_Given_an_answer_and_contents_asked_for_Then_one_line_has_both(lines: list[dict[str, Any]]) -> None:
    tell_contents(log, REQUEST, {"text": "x" * 5000})
    assert lines[0]["request_id"] == "r1"
    assert len(lines[0]["message"]) < 3000


def test_Given_people_Then_a_line_has_its_fields_behind_it_and_the_stack_of_an_error_below() -> None:
    formatter = ConsoleFormatter(Redactor())

    def written(level: int, error: Exception) -> str:
        return formatter.format(logging.LogRecord("n", level, "f", 1, "failed: %s", (error,), None))

    with log_context(request_id="r1"):
        assert written(logging.WARNING, ValueError("x")).endswith(
            "WARNING n: failed: x [request_id=r1 error_type=ValueError]"
        )
        assert "Traceback" in written(logging.ERROR, _raised())


def _raised() -> Exception:
    try:
        raise ValueError("raised")
    except ValueError as error:
        return error


def test_Given_arguments_that_do_not_fit_Then_the_line_is_not_lost() -> None:
    record = logging.LogRecord("n", logging.INFO, "f", 1, "%d requests", ("many",), None)
    assert "many" in JsonFormatter(Redactor(), "p").format(record)


def test_Given_a_process_Then_its_libraries_lines_go_the_same_way(tmp_path: Any) -> None:
    settings = build_settings(
        {"monitoring": {"logs": {"format": "json", "folder": str(tmp_path), "min_free_mb": 0}}}, {}
    )
    stream = io.StringIO()
    root = logging.getLogger()
    before = root.handlers[:], root.level
    keeper = set_up_logging(settings, "worker 1/a", "INFO", stream)
    try:
        logging.getLogger("uvicorn.error").info("serving")
        logging.getLogger("celery.worker").warning("mingling")
        logging.getLogger("anything").debug("not this")
    finally:
        keeper.close()
        for handler in root.handlers:
            handler.close()
        root.handlers, level = before
        root.setLevel(level)
        logging.captureWarnings(False)
    said = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["logger"] for line in said] == ["uvicorn.error", "celery.worker"]
    assert (tmp_path / "worker-1-a.log").read_text() == stream.getvalue()


def test_Given_the_supervisor_and_JSON_Then_every_line_is_an_object_and_those_that_were_stay() -> None:
    stream = io.StringIO()
    console = JsonConsole(stream)
    console.line("worker-1", '{"message": "as it came"}')
    console.line("redis", "Ready to accept connections")
    console.close()
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first == {"message": "as it came"}
    assert second["process"] == "redis"
