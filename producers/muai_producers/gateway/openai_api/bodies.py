"""What OpenAI's clients send: the shapes, and a clear refusal of what there is not.

Ranges are those of our own `Parameters`, and are checked when a body is made into requests.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from muai_producers.errors import InvalidRequestError, MalformedMessageError

MAX_TEXTS = 2048
_STRINGS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
_CONTENT = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "object", "required": ["type", "text"]}},
        {"type": "null"},
    ],
    "description": 'A text, or a list of parts `{"type": "text", "text": …}`.',
}


class UnsupportedFieldError(InvalidRequestError):
    """A part of OpenAI's API that there is not."""

    code = "unsupported_parameter"


def _texts(value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts:
        raise ValueError("must be a text or a list of texts")
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("must be a text or a list of texts; lists of tokens are not taken")
    if len(texts) > MAX_TEXTS:
        raise ValueError(f"has {len(texts)} texts, at most {MAX_TEXTS} are taken")
    return texts


def _stops(value: Any) -> list[str]:
    return [] if value is None else _texts(value)


def _content(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a text or a list of parts")
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"only parts of the type text are taken, got {kind!r}")
    return "".join(part["text"] for part in value)


Texts = Annotated[list[str], BeforeValidator(_texts), WithJsonSchema(_STRINGS)]
Stops = Annotated[list[str], BeforeValidator(_stops), WithJsonSchema({**_STRINGS, "default": None})]
Content = Annotated[str | None, BeforeValidator(_content), WithJsonSchema(_CONTENT)]


class Body(BaseModel):
    """Strict: a number in quotes is no number, and an unknown field is a mistake."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(Body):
    """What a stream tells beside its text."""

    include_usage: bool = Field(default=False, description="One more chunk before the last, with the tokens used.")
    include_obfuscation: Literal[False] | None = None


class ChatMessage(Body):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    # What an answer's message holds, and comes back with it in the next turn.
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None

    def turn(self) -> dict[str, Any]:
        """The turn as it travels."""
        fields = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.content,
            "name": self.name,
            "tool_calls": self.tool_calls or None,
            "tool_call_id": self.tool_call_id,
        }
        return {name: value for name, value in fields.items() if value is not None}


class Generation(Body):
    """What chat completions and completions have in common."""

    model: str = Field(min_length=1, max_length=256, description="A name that GET /v1/models lists.")
    n: int | None = Field(default=None, ge=1, le=128, description="Answers to each prompt.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = Field(default=None, description="1 where it is left out; 0 is greedy.")
    top_p: float | None = None
    stop: Stops = Field(default_factory=list)
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    user: str | None = Field(default=None, description="Taken, and without effect.")
    # Beyond OpenAI's: what its clients send as `extra_body`.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    truncate: bool | None = Field(default=None, description="Cut a prompt that is too long, rather than refuse it.")
    priority: int | None = Field(default=None, description="9 is the most urgent; 5 where it is left out.")
    deadline_s: float | None = Field(
        default=None, description="Seconds for queueing, retries and inference together; 0.1 at least."
    )
    conversation_id: str | None = Field(
        default=None, description="Requests of one conversation go to the worker that has its cache."
    )

    @property
    def include_usage(self) -> bool:
        """Whether a stream is to tell the tokens used."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatCompletionBody(Generation):
    """A chat to be gone on with."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = None
    response_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = Field(default=None, description="Taken, and without effect.")
    metadata: dict[str, str] | None = Field(default=None, description="Taken, and without effect.")
    safety_identifier: str | None = Field(default=None, description="Taken, and without effect.")
    prompt_cache_key: str | None = Field(default=None, description="Taken, and without effect.")
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    logprobs: Literal[False] | None = None


class CompletionBody(Generation):
    """Texts to be gone on with."""

    prompt: Texts
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None


class EmbeddingBody(Body):
    """Texts to be embedded."""

    model: str = Field(min_length=1, max_length=256, description="A name that GET /v1/models lists.")
    input: Texts
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = Field(default=None, description="Taken, and without effect.")
    truncate: bool | None = Field(default=None, description="Cut a text that is too long, rather than refuse it.")
    priority: int | None = Field(default=None, description="9 is the most urgent; 5 where it is left out.")
    deadline_s: float | None = Field(
        default=None, description="Seconds for queueing, retries and inference together; 0.1 at least."
    )


LACKING = frozenset(
    (
        *("audio", "dimensions", "function_call", "functions", "logit_bias", "modalities", "moderation", "prediction"),
        *("prompt_cache_options", "prompt_cache_retention", "reasoning_effort", "suffix", "top_logprobs", "verbosity"),
        "web_search_options",
    )
)
"""Parts of OpenAI's API that there are not."""
AnyBody = TypeVar("AnyBody", bound=Body)


def read_body(raw: bytes, kind: type[AnyBody]) -> AnyBody:
    """Decode a body.

    Raises:
        MalformedMessageError: it is not JSON.
        UnsupportedFieldError, InvalidRequestError: `field` names what is wrong.
    """
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        raise MalformedMessageError(f"the body is not JSON: {first['msg']}")
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).removeprefix(".")
    if first["type"] == "extra_forbidden" and field in LACKING:
        raise UnsupportedFieldError(f"there is no {field} here; leave it out", {"field": field})
    if first["type"] == "extra_forbidden":
        raise InvalidRequestError(f"unknown field {field}", {"field": field})
    if first["type"] in ("literal_error", "none_required") and first["loc"][-1] not in ("role", "encoding_format"):
        raise UnsupportedFieldError(f"{field}: {first['msg']}; nothing else is to be had here", {"field": field})
    raise InvalidRequestError(f"{field}: {first['msg'].removeprefix('Value error, ')}", {"field": field})
