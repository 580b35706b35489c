"""Lines of a batch's files: read, checked, answered. Pure."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from muai_producers.batches.records import BatchProblem, BatchRecord, OpenLine
from muai_producers.batches.translation import openai_answer, requests_from_openai
from muai_producers.errors import InvalidRequestError, MuaiError
from muai_producers.gateway.submission import RequestBuilder
from muai_producers.wire import InferenceRequest, InferenceResult

LINES = uuid.UUID("1c9d35c6-2a68-5c0c-93f4-0d3a6c5a1f00")
LOWEST_PRIORITY = 0
MAX_PROBLEMS = 100


class InputLine(msgspec.Struct, frozen=True, kw_only=True):
    """One line of an input file."""

    custom_id: Annotated[str, Meta(min_length=1, max_length=512)]
    method: Literal["POST"]
    url: str
    body: dict[str, Any]


_decode = msgspec.json.Decoder(InputLine).decode


def read_line(raw: bytes, endpoint: str) -> InputLine:
    """Read a line.

    Raises:
        InvalidRequestError: it is no request for the endpoint.
    """
    try:
        line = _decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"the line is no request with custom_id, method, url and body: {error}") from None
    if line.url != endpoint:
        raise InvalidRequestError(f"the line is for {line.url[:100]!r}, the batch for {endpoint}", {"field": "url"})
    return line


class InputCheck:
    """Checks an input file as its lines come; keeps what is wrong with it, the first of it.

    Args:
        max_line_bytes: what one request may take.
    """

    def __init__(self, endpoint: str, max_lines: int, max_line_bytes: int) -> None:
        self.num_lines = 0
        self.problems: list[BatchProblem] = []
        self._endpoint = endpoint
        self._max_lines = max_lines
        self._max_line_bytes = max_line_bytes
        self._custom_ids: set[str] = set()

    def see(self, raw: bytes, number: int) -> bool:
        """Check the line of this number, from 1; False when there is no use in going on."""
        if not raw.strip():
            return True
        self.num_lines += 1
        if self.num_lines > self._max_lines:
            told = f"the file has more than {self._max_lines} requests (gateway.batches.max_lines)"
            self.problems.append(BatchProblem(code="too_many_requests", message=told))
            return False
        if len(raw) > self._max_line_bytes:
            self._wrong("line_too_long", f"the line has more than {self._max_line_bytes} bytes", None, number)
            return len(self.problems) < MAX_PROBLEMS
        try:
            line = read_line(raw, self._endpoint)
        except InvalidRequestError as error:
            self._wrong("invalid_line", error.message, error.details.get("field"), number)
        else:
            if line.custom_id in self._custom_ids:
                told = f"custom_id {line.custom_id[:100]!r} was used before"
                self._wrong("duplicate_custom_id", told, "custom_id", number)
            self._custom_ids.add(line.custom_id)
        return len(self.problems) < MAX_PROBLEMS

    def end(self) -> list[BatchProblem]:
        """What is wrong with the file as a whole."""
        if not self.num_lines and not self.problems:
            self.problems.append(BatchProblem(code="empty_file", message="the file holds no requests"))
        return self.problems

    def _wrong(self, code: str, message: str, param: str | None, number: int) -> None:
        self.problems.append(BatchProblem(code=code, message=message, param=param, line=number))


def line_requests(
    builder: RequestBuilder, batch: BatchRecord, line: InputLine, number: int, num_tries: int
) -> list[InferenceRequest]:
    """The requests of a line. Their ids follow from the batch, the line and the try alone, and so do their idempotency
    keys: submitted twice, by whoever, they are the same requests.

    Raises:
        RequestError: the body is none that can be served.
    """
    requests = []
    for place, body in enumerate(requests_from_openai(batch.body.endpoint, line.body)):
        name = f"{batch.id}/{number}/{place}/{num_tries}"
        request_id = str(uuid.uuid5(LINES, name))
        built = builder.build(body, {}, request_id, tenant=batch.tenant, trace={})
        own_deadline = built.deadline if body.deadline_s is not None else None  # not the one of the configuration
        requests.append(
            msgspec.structs.replace(
                built,
                priority=LOWEST_PRIORITY,
                deadline=min(float(batch.expires_at), own_deadline or float("inf")),
                idempotency_key=f"batch {name}",
            )
        )
    return requests


def answered_line(
    batch: BatchRecord,
    open_line: OpenLine,
    body: dict[str, Any],
    outcomes: Sequence[InferenceResult | MuaiError],
    now_s: float,
) -> tuple[bytes, bool]:
    """The line that answers a line, and whether it is a success: one failure makes it none."""
    for outcome in outcomes:
        if isinstance(outcome, MuaiError):
            if outcome.code == "deadline_exceeded" and now_s >= batch.expires_at:
                return unserved_line(batch, open_line.number, open_line.custom_id, "expired"), False
            return failed_line(batch, open_line.number, open_line.custom_id, outcome, open_line.request_ids[0]), False
    results = [outcome for outcome in outcomes if isinstance(outcome, InferenceResult)]
    first_id = open_line.request_ids[0]
    answer = openai_answer(batch.body.endpoint, body, results, first_id)
    response = {"status_code": 200, "request_id": first_id, "body": answer}
    return _line(batch, open_line.number, open_line.custom_id, response, None), True


def failed_line(batch: BatchRecord, number: int, custom_id: str, error: MuaiError, request_id: str = "") -> bytes:
    """The line of a request that was answered with an error, or refused."""
    told = {"code": error.code, "message": error.message, "type": type(error).__name__, "param": None}
    told["param"] = error.details.get("field")
    response = {"status_code": error.http_status, "request_id": request_id, "body": {"error": told}}
    return _line(batch, number, custom_id, response, None)


def unserved_line(batch: BatchRecord, number: int, custom_id: str, why: Literal["expired", "cancelled"]) -> bytes:
    """The line of a request that was not made, or not finished, before the batch ended."""
    told = {
        "expired": "the batch's completion window ended before this request was done",
        "cancelled": "the batch was cancelled before this request was done",
    }
    return _line(batch, number, custom_id, None, {"code": f"batch_{why}", "message": told[why]})


def _line(batch: BatchRecord, number: int, custom_id: str, response: Any, error: Any) -> bytes:
    line_id = f"batch_req_{uuid.uuid5(LINES, f'{batch.id}/{number}').hex}"
    told = {"id": line_id, "custom_id": custom_id, "response": response, "error": error}
    return msgspec.json.encode(told) + b"\n"
