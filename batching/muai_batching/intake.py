"""From a broker message to a request that may be batched: everything that can be wrong with it is found here."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec

from muai_batching.assembler import BatchKey
from muai_batching.routing import resolve_chain
from muai_producers.errors import (
    EnginesExhaustedError,
    InputTooLongError,
    MalformedMessageError,
    ModelNotFoundError,
    UnsupportedTaskError,
)
from muai_producers.token_estimates import input_tokens
from muai_producers.wire import (
    InferenceRequest,
    request_from_fields,
    validate_inputs,
)

if TYPE_CHECKING:
    from muai_config import Settings

_AS_SENT_BY_US = msgspec.json.Decoder(tuple[Any, InferenceRequest, Any])
_DECODERS = {"application/json": msgspec.json.decode, "application/x-msgpack": msgspec.msgpack.decode}


def read_request(
    headers: Mapping[str, Any], content_type: str | None, body: bytes | str, now_s: float
) -> InferenceRequest:
    """Decode the message of a `muai.infer` task, from our client or from any Celery producer.

    Raises:
        MalformedMessageError: the message is no such task, or its content type is not JSON or msgpack.
        InvalidRequestError: its keyword arguments are no request.
    """
    if content_type == "application/json":
        try:
            request = _AS_SENT_BY_US.decode(body)[1]
            if request.submitted_at and not headers.get("expires"):
                return request
        except msgspec.DecodeError:
            pass  # said properly below
    request_id = headers.get("id")
    if not isinstance(request_id, str) or not request_id:
        raise MalformedMessageError("the message has no task id")
    kwargs = _keyword_arguments(content_type, body)
    expires = headers.get("expires")
    if expires and kwargs.get("deadline") is None:
        kwargs = {**kwargs, "deadline": _epoch_seconds(expires)}
    return request_from_fields(kwargs, request_id=request_id, now_s=now_s)


def _keyword_arguments(content_type: str | None, body: bytes | str) -> dict[str, Any]:
    decode: Any = _DECODERS.get(content_type or "")
    if decode is None:
        raise MalformedMessageError(
            f"content type {content_type!r} is refused; send JSON or msgpack", {"content_type": content_type}
        )
    try:
        content = decode(body.encode() if isinstance(body, str) else body)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise MalformedMessageError(f"the message's body cannot be decoded: {error}") from error
    if not isinstance(content, list | tuple) or len(content) != 3 or not isinstance(content[1], dict):
        raise MalformedMessageError("the message's body is not Celery's [args, kwargs, embed]")
    if content[0]:
        raise MalformedMessageError("muai.infer takes keyword arguments only")
    return content[1]


def _epoch_seconds(expires: Any) -> float:
    try:
        moment = datetime.fromisoformat(str(expires))
    except ValueError as error:
        raise MalformedMessageError(f"the header expires is no ISO 8601 time: {expires!r}") from error
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


class Resolver:
    """Checks requests against the catalog and finds their batch keys."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._keys: dict[tuple[str, str | None, tuple[str, ...]], BatchKey] = {}

    def resolve(self, request: InferenceRequest) -> tuple[BatchKey, InferenceRequest, int]:
        """The request's batch key, the request with its inputs under their task's own key, and its tokens (estimated).

        Raises:
            RequestError: unknown model, a task that it does not serve, wrong or empty inputs, too long.
            EnginesExhaustedError: the configuration leaves the model no engine.
        """
        key = self._key(request)
        inputs = validate_inputs(key.task, request.inputs)
        if inputs != request.inputs:
            request = msgspec.structs.replace(request, inputs=inputs)
        return key, request, self._tokens(request, key)

    def _key(self, request: InferenceRequest) -> BatchKey:
        seen = (request.model, request.task, request.engine_preference)
        key = self._keys.get(seen)
        if key is None:
            key = self._new_key(request)
            if len(self._keys) < 10_000:  # preferences are the sender's: do not let them fill the memory
                self._keys[seen] = key
        return key

    def _new_key(self, request: InferenceRequest) -> BatchKey:
        spec = self._settings.models.get(request.model)
        if spec is None:
            raise unknown_model(request.model, self._settings.models)
        task = request.task or spec.task
        if not spec.serves(task, has_chat_template=True):  # whether it has one shows when an engine loads it
            raise UnsupportedTaskError(
                f"model {request.model!r} serves {spec.task}, not {task}", {"model": request.model, "task": task}
            )
        configured = self._settings.chain(spec)
        chain = resolve_chain(request.engine_preference, configured, configured)
        if not chain:
            raise EnginesExhaustedError(f"no engine that serves {request.model!r} is enabled", {"attempts": []})
        return BatchKey(request.model, task, chain)

    def _tokens(self, request: InferenceRequest, key: BatchKey) -> int:
        tokens = input_tokens(request.inputs, request.parameters)
        limit = self._settings.models[key.model].max_input_tokens
        if limit is not None and tokens > limit:
            # The engine counts exactly, and refuses or cuts; to batching it is as long as the model takes.
            tokens = limit
        cap = self._settings.optimization.batcher.max_batch_tokens
        if tokens > cap:
            if request.parameters.truncate:
                return cap
            raise InputTooLongError(
                f"the input has about {tokens} tokens, a batch may have {cap} (optimization.batcher.max_batch_tokens)",
                {"tokens": tokens, "max_tokens": cap},
            )
        return tokens


def unknown_model(name: str, known: Mapping[str, Any]) -> ModelNotFoundError:
    """The error for a model that the catalog lacks, with the nearest name."""
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known)[:10]) or 'none'}"
    return ModelNotFoundError(f"unknown model {name[:100]!r}; {hint}", {"model": name[:256]})
