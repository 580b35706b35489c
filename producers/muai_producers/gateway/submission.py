"""From a POST body and its headers to a request that the queue may have: everything refusable is found here."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from muai_config import UnknownModelError
from muai_config.engines import ALL_ENGINES
from muai_producers.chat import Message
from muai_producers.errors import (
    InvalidRequestError,
    MalformedMessageError,
    ModelNotFoundError,
    PayloadTooLargeError,
    UnsupportedTaskError,
)
from muai_producers.webhooks.policy import HookPolicy
from muai_producers.wire import (
    DEFAULT_PRIORITY,
    InferenceRequest,
    Name,
    Parameters,
    TaskName,
    TraceHeader,
    WebhookUrl,
    validate_inputs,
)

if TYPE_CHECKING:
    from muai_config import Settings

Body = TypeVar("Body")
MIN_DEADLINE_S, MAX_DEADLINE_S = 0.1, 31_536_000
"""Of a request over HTTP: one that has less would be told of its end before an engine could have it."""
Seconds = Annotated[float, Meta(ge=MIN_DEADLINE_S, le=MAX_DEADLINE_S)]
Priority = Annotated[int, Meta(ge=0, le=9)]
IDEMPOTENCY_KEY, PRIORITY, DEADLINE = "idempotency-key", "x-muai-priority", "x-muai-deadline-s"
_KEY = re.compile(r"[\x21-\x7e]{1,256}")
IdempotencyKey = Annotated[str, Meta(min_length=1, max_length=256, pattern="^[!-~]*$")]
_PATH = re.compile(r" - at `\$\.?([^`]*)`$")
_NAMED_FIELD = re.compile(r"field `([^`]*)`")


class InferenceBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One inference to be made."""

    model: Name
    """A name that GET /v1/models lists."""
    inputs: str | list[Message] | dict[str, Any]
    """A text, a list of chat messages, or an object with the one key that the task reads: `text`, `prompt` or
    `messages`."""
    task: TaskName | None = None
    """The model's own task where it is left out."""
    parameters: Parameters = Parameters()
    priority: Priority | None = None
    """9 is the most urgent; 5 where it is left out. The header X-Muai-Priority says the same."""
    deadline_s: Seconds | None = None
    """Seconds from now for queueing, retries and inference together; 0.1 at least. The header X-Muai-Deadline-S says
    the same."""
    conversation_id: Name | None = None
    """Requests of one conversation go to the worker that has its cache."""
    engine_preference: Annotated[tuple[Name, ...], Meta(max_length=8)] = ()
    """Engines to try first, in order."""
    idempotency_key: IdempotencyKey | None = None
    """A repeated request with the same key and content is the same request. The header Idempotency-Key says the
    same."""
    webhook: WebhookUrl | None = None
    """Where word of the end is posted to, signed; its host must be one that the gateway allows."""
    stream: bool = False
    """Tell the text as it is generated, at `/v1/inference/{id}/stream`."""


class ManyBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Many inferences to be made; each is accepted or refused by itself."""

    requests: list[msgspec.Raw]
    """Each as the body of POST /v1/inference."""


_decode_many = msgspec.json.Decoder(ManyBody).decode
_decode = msgspec.json.Decoder(InferenceBody).decode


def read_body(raw: bytes) -> InferenceBody:
    """Decode a POST body.

    Raises:
        MalformedMessageError: it is not JSON.
        InvalidRequestError: a field is missing, unknown, of the wrong type or out of range; `field` names it.
    """
    return read_struct(_decode, raw)


def read_many(raw: bytes, max_requests: int) -> list[msgspec.Raw]:
    """Decode the body of a POST of many, its requests left as they are.

    Raises:
        MalformedMessageError, InvalidRequestError: as `read_body`, of what is around the requests.
    """
    requests = read_struct(_decode_many, raw).requests
    if not 1 <= len(requests) <= max_requests:
        raise InvalidRequestError(
            f"requests must have 1 to {max_requests} entries (gateway.max_requests_per_call), got {len(requests)}",
            {"field": "requests"},
        )
    return requests


def read_struct(decode: Callable[[bytes], Body], raw: bytes) -> Body:
    """Decode a JSON body with one of msgspec's decoders; raises as `read_body`."""
    try:
        return decode(raw)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(_sentence(str(error)), {"field": _field(str(error))}) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedMessageError(f"the body is not JSON: {error}") from None


def _field(told: str) -> str:
    """The dotted path of the field that a validation error of msgspec's is about; '' for the body as a whole."""
    path = _PATH.search(told)
    named = _NAMED_FIELD.search(told)
    return ".".join(filter(None, (path[1] if path else "", named[1] if named else "")))


def _sentence(told: str) -> str:
    field = _PATH.search(told)
    return f"{field[1]}: {told[: field.start()]}" if field and field[1] else _PATH.sub("", told)


class RequestBuilder:
    """Builds requests under one configuration.

    Args:
        reply_channel: where word of their end is to go; None: nowhere.
        head: decides whether a request is traced that comes without a trace of its caller's.
    """

    def __init__(
        self,
        settings: Settings,
        reply_channel: str | None,
        head: Callable[[str], dict[TraceHeader, str]] = lambda _: {},
    ) -> None:
        self._settings = settings
        self._reply_channel = reply_channel
        self._head = head
        self._webhooks = HookPolicy(settings.gateway.webhooks)
        self.max_body_bytes = settings.queue.max_payload_mb * 1_000_000

    def on_settings(self, settings: Settings) -> None:
        """Build by these settings from now on, as far as they are reloadable."""
        self._settings = settings

    def build(
        self,
        body: InferenceBody,
        headers: Mapping[str, str],
        request_id: str,
        *,
        tenant: str,
        trace: dict[TraceHeader, str],
    ) -> InferenceRequest:
        """The request as it travels.

        Args:
            headers: of HTTP, their names in lower case; no others than those are read that a body can say too.
        Raises:
            ModelNotFoundError, UnsupportedTaskError: the catalog says no.
            InvalidRequestError: a field or a header is wrong; `field` names it.
        """
        now_s = time.time()
        self._check_engines(body.engine_preference)
        task = self._task(body)
        inputs = validate_inputs(task, _inputs(body.inputs))
        priority = _once("priority", body.priority, PRIORITY, headers, int, 0, 9)
        deadline_s = _once("deadline_s", body.deadline_s, DEADLINE, headers, float, MIN_DEADLINE_S, MAX_DEADLINE_S)
        if deadline_s is None:
            deadline_s = self._settings.queue.default_deadline_s
        return InferenceRequest(
            id=request_id,
            model=body.model,
            inputs=inputs,
            task=body.task,
            parameters=body.parameters,
            engine_preference=body.engine_preference,
            priority=DEFAULT_PRIORITY if priority is None else int(priority),
            deadline=None if deadline_s is None else now_s + deadline_s,
            conversation_id=body.conversation_id,
            tenant=tenant,
            idempotency_key=idempotency_key(body.idempotency_key, headers),
            webhook=None if body.webhook is None else self._webhooks.check(body.webhook),
            trace=trace or self._head(request_id),
            stream=body.stream,
            submitted_at=now_s,
            reply_to=self._reply_channel,
        )

    def check_size(self, num_bytes: int) -> None:
        """Raises: PayloadTooLargeError: a body may not have so many bytes."""
        if num_bytes > self.max_body_bytes:
            raise PayloadTooLargeError(
                f"the body has more than {self.max_body_bytes} bytes (queue.max_payload_mb)",
                {"max_bytes": self.max_body_bytes},
            )

    def _task(self, body: InferenceBody) -> TaskName:
        try:
            spec = self._settings.model(body.model)
        except UnknownModelError as error:
            raise ModelNotFoundError(error.message, {"field": "model", "model": body.model}) from None
        task = body.task or spec.task
        # Whether a text generation model can chat shows when an engine loads it.
        if not spec.serves(task, has_chat_template=True):
            raise UnsupportedTaskError(
                f"model {body.model!r} serves {spec.task}, not {task}",
                {"field": "task", "model": body.model, "task": task},
            )
        return task

    @staticmethod
    def _check_engines(preference: tuple[str, ...]) -> None:
        for engine in preference:
            if engine not in ALL_ENGINES:
                raise InvalidRequestError(
                    f"engine_preference: there is no engine {engine!r}; there are {', '.join(ALL_ENGINES)}",
                    {"field": "engine_preference"},
                )


def _inputs(given: str | list[Message] | dict[str, Any]) -> dict[str, Any]:
    if isinstance(given, str):
        return {"text": given}
    return given if isinstance(given, dict) else {"messages": msgspec.to_builtins(given)}


def idempotency_key(given: str | None, headers: Mapping[str, str]) -> str | None:
    """The idempotency key that body or header names, not both."""
    key = headers.get(IDEMPOTENCY_KEY)
    if key is None:
        return given
    if given is not None:
        raise InvalidRequestError(
            "idempotency_key is given twice: in the body and as the header", {"field": "idempotency_key"}
        )
    if not _KEY.fullmatch(key):
        raise InvalidRequestError(
            "the header Idempotency-Key must have 1 to 256 visible ASCII characters", {"field": "Idempotency-Key"}
        )
    return key


def _once(
    field: str,
    given: float | None,
    header: str,
    headers: Mapping[str, str],
    number: type[int] | type[float],
    low: float,
    high: float,
) -> float | None:
    """A number that body or header may name, not both."""
    told = headers.get(header)
    if told is None:
        return given
    if given is not None:
        raise InvalidRequestError(f"{field} is given twice: in the body and as the header {header}", {"field": field})
    value = parse_number(told, number)
    if value is None or not low <= value <= high:
        kind = "a whole number" if number is int else "a number"
        raise InvalidRequestError(
            f"the header {header} must be {kind} from {low:g} to {high:g}, got {told[:40]!r}", {"field": header}
        )
    return value


_NUMBER = re.compile(r"[0-9]{1,12}(\.[0-9]{1,9})?")


def parse_number(text: str, number: type[int] | type[float] = float) -> float | None:
    """The number that a header or a query names in plain decimal digits; None when it is none."""
    match = _NUMBER.fullmatch(text.strip())
    if match is None or (number is int and match[1]):
        return None
    return number(text)
