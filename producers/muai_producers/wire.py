"""What travels: requests, results and batches, as JSON, with unknown fields refused and sizes bounded.

msgspec rather than pydantic: these are decoded once per request and hop, and msgspec validates and decodes in one
pass of about a microsecond (see docs/adr/0003-msgspec-on-the-wire.md).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from muai_producers.chat import Message, ResponseFormat, Tool, ToolChoice, forced_tools
from muai_producers.errors import InvalidRequestError

TaskName = Literal["text-generation", "chat", "embedding", "text-classification", "summarization"]
INPUT_FIELD: dict[str, str] = {
    "text-generation": "prompt",
    "chat": "messages",
    "embedding": "text",
    "text-classification": "text",
    "summarization": "text",
}
"""The key of `InferenceRequest.inputs` that each task reads."""

DEFAULT_PRIORITY = 5
Name = Annotated[str, Meta(min_length=1, max_length=256, pattern="^[^\\x00-\\x1f]*$")]
"""No control characters: names are parts of keys and of tab-separated records."""
StopString = Annotated[str, Meta(min_length=1, max_length=256)]


WebhookUrl = Annotated[str, Meta(min_length=8, max_length=2048, pattern="^https?://[^\\x00-\\x20\\x7f]+$")]
TraceHeader = Literal["traceparent", "tracestate"]
TraceValue = Annotated[str, Meta(max_length=512, pattern="^[\\x20-\\x7e]*$")]


class Parameters(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True, gc=False):
    """How to run a request. Every field has a default that suits unattended work: greedy, deterministic."""

    max_tokens: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    """Most new tokens; None: the model's `max_new_tokens`."""
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] = 0.0
    """0 is greedy."""
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    """0 switches it off."""
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    """Least probability of a token, as a share of the likeliest one's; 0 switches it off."""
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=10.0)] = 1.0
    presence_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    """Taken from the logit of each token that the answer holds already."""
    frequency_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    """The same, for each time that the answer holds it."""
    stop: Annotated[tuple[StopString, ...], Meta(max_length=16)] = ()
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    truncate: bool = False
    """Cut an over-long input to the model's limit, rather than refuse it."""
    encoding_format: Literal["float", "base64"] | None = None
    """What an embedding is written as: a list of numbers, or base64 of 32-bit floats, the lowest byte first, which is
    half as long. None: numbers, but that `InferenceClient` asks for base64 then, and unpacks it."""
    response_format: ResponseFormat | None = None
    """What the text of the answer must be; None: anything."""
    tools: Annotated[tuple[Tool, ...], Meta(max_length=128)] = ()
    """What the model may ask to be called; written into the prompt by the model's chat template."""
    tool_choice: ToolChoice | None = None
    """None: `auto` where there are tools."""

    def __post_init__(self) -> None:
        forced_tools(self.tools, self.tool_choice)


class InferenceRequest(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True, gc=False
):
    """One inference asked for by one client. `id` is the Celery task id."""

    id: Name
    model: Name
    inputs: dict[str, Any]
    """One key, by task: `prompt` (text), `messages` (list of role and content), or `text`."""
    task: TaskName | None = None
    """None: the catalog's task for the model."""
    parameters: Parameters = Parameters()
    engine_preference: Annotated[tuple[Name, ...], Meta(max_length=8)] = ()
    """Engines to try first, in order; the rest of the model's chain follows."""
    priority: Annotated[int, Meta(ge=0, le=9)] = DEFAULT_PRIORITY
    """9 is the most urgent."""
    deadline: float | None = None
    """Wall-clock seconds since the epoch: one budget for queue, retries and fallbacks."""
    conversation_id: Name | None = None
    tenant: Name = "default"
    idempotency_key: Name | None = None
    stream: bool = False
    submitted_at: float = 0.0
    """Wall-clock seconds since the epoch."""
    reply_to: Name | None = None
    """Channel on which the sender listens for finished ids; None: nobody waits that way."""
    webhook: WebhookUrl | None = None
    """Address that word of the end is posted to, for requests that were admitted; a plain Celery message is not."""
    trace: dict[TraceHeader, TraceValue] = {}
    """W3C trace context of whoever asked, as it is in the message's headers too; that of the request's own span where
    it begins a trace. See `muai_producers.tracing.context`."""


class Attempt(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One engine that did not serve the request, and why."""

    engine: str
    error: dict[str, Any]
    """As `MuaiError.to_wire` gives it."""


class Batch(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """Requests that one engine worker takes together. All share model, task, engine chain and `attempts`."""

    id: str
    engine: str
    model: str
    task: TaskName
    requests: list[InferenceRequest]
    chain: tuple[str, ...]
    """Engines still to be tried after `engine`, in order."""
    attempts: tuple[Attempt, ...] = ()
    received_at: tuple[float, ...] = ()
    """When the collector got each request, in the order of `requests`; wall-clock seconds since the epoch."""
    formed_at: float = 0.0
    """Wall-clock seconds since the epoch."""
    deaths: int = 0
    """Workers that died while they ran these requests."""
    queue: str = ""
    """The own queue of a worker that it was sent to; '' for its engine's queue, which all workers of it consume."""
    after: str = ""
    """The batch in which these requests were tried before; '' for the first."""


class InferenceResult(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a successful request is answered with; the specification's field names."""

    outputs: dict[str, Any]
    engine_used: str
    latency_ms: float
    """From submission to answer, queueing included."""
    batch_size: int
    cache_hit: bool
    metadata: dict[str, Any]
    """`request_id`, `model`, `task`, `queue_ms`, `batching_ms`, `inference_ms`, `attempts`, `batch_id`, `worker`,
    `gpu_id`, `usage` (`input_tokens`, `output_tokens`)."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-compatible types."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> InferenceResult:
        """Inverse of `to_dict`.

        Raises:
            InvalidRequestError: `plain` is no result.
        """
        try:
            return msgspec.convert(plain, cls)
        except msgspec.ValidationError as error:
            raise InvalidRequestError(f"not an inference result: {error}") from error


def new_request_id() -> str:
    """A random UUID, as Celery makes its task ids."""
    return str(uuid.uuid4())


def validate_inputs(task: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Check that `inputs` holds exactly what `task` reads and is not empty; returns it under the task's own key.

    `text` and `prompt` mean the same to every task; for `chat` they become one user turn.

    Raises:
        InvalidRequestError: names the field and what is expected.
    """
    field = INPUT_FIELD[task]
    if len(inputs) != 1 or not set(inputs) <= {"text", "prompt", "messages"}:
        got = ", ".join(sorted(map(str, inputs))) or "nothing"
        raise InvalidRequestError(f"inputs for {task} must hold exactly {field!r}, got: {got}", {"field": "inputs"})
    given, value = next(iter(inputs.items()))
    if field == "messages":
        turns = value if given == "messages" else [{"role": "user", "content": value}]
        return {"messages": _checked_messages(turns)}
    if given == "messages":
        raise InvalidRequestError(f"inputs for {task} must hold {field!r}, got messages", {"field": "inputs"})
    where = f"inputs.{given}"
    if not isinstance(value, str):
        raise InvalidRequestError(f"{where} must be a string, got {type(value).__name__}", {"field": where})
    if not value.strip():
        raise InvalidRequestError(f"{where} is empty", {"field": where})
    return {field: value}


def check_inputs(task: str, inputs: Mapping[str, Any]) -> None:
    """As `validate_inputs`, for those who are given requests after it: the task's own key must be there.

    Raises:
        InvalidRequestError: names the field and what is expected.
    """
    validate_inputs(task, inputs)
    if INPUT_FIELD[task] not in inputs:
        raise InvalidRequestError(f"inputs for {task} must hold {INPUT_FIELD[task]!r}", {"field": "inputs"})


def _checked_messages(turns: Any) -> list[Any]:
    try:
        messages = msgspec.convert(turns, list[Message])
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"inputs.messages: {error}", {"field": "inputs.messages"}) from error
    if not any((message.content or "").strip() or message.tool_calls for message in messages):
        raise InvalidRequestError("inputs.messages is empty", {"field": "inputs.messages"})
    plain: list[Any] = msgspec.to_builtins(messages)
    return plain


def request_from_fields(fields: Mapping[str, Any], *, request_id: str, now_s: float | None = None) -> InferenceRequest:
    """Build a request from the keyword arguments of a `muai.infer` message.

    Args:
        fields: any field of `InferenceRequest` but `id`.
        request_id: the Celery task id.
        now_s: wall-clock seconds, taken as `submitted_at` where the sender gave none.
    Raises:
        InvalidRequestError: a field is missing, unknown, of the wrong type or out of range.
    """
    values = dict(fields)
    if values.setdefault("id", request_id) != request_id:
        raise InvalidRequestError("the field id differs from the task id", {"field": "id"})
    if not values.get("submitted_at"):
        values["submitted_at"] = time.time() if now_s is None else now_s
    try:
        return msgspec.convert(values, InferenceRequest)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"invalid request: {error}") from error
