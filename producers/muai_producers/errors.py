"""Every error that MuAI answers with: one tree, each class with a stable code.

A class says three things to whoever meets it: `code` (stable, machine-readable), `retryable` (whether the same
request may succeed later or elsewhere) and `http_status` (what the gateway answers). Request errors are the
sender's and are never retried; engine errors send the request to the next engine of its chain; broker errors are
retried in place; terminal errors end the request.

Errors travel through Celery's result backend as `(module, class name, args)`, so each must be constructible from
its own `args`: a message and a JSON-compatible mapping of details.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar


class MuaiError(Exception):
    """Root of the tree.

    Args:
        message: one sentence naming the thing, the value and the way out.
        details: the same facts for machines; must survive JSON.
    """

    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, details: Mapping[str, Any] | None = None) -> None:
        self.message = message
        self.details: dict[str, Any] = dict(details or {})
        super().__init__(message, self.details)

    def __str__(self) -> str:
        return self.message

    def to_wire(self) -> dict[str, Any]:
        """The error as results and HTTP answers carry it: `type`, `code`, `message`, `retryable`, `details`."""
        return {
            "type": type(self).__name__,
            "code": self.code,
            "message": self.message,
            "retryable": self.retryable,
            "details": self.details,
        }


class RequestError(MuaiError):
    """The request itself is wrong; sending it again unchanged cannot help."""

    code = "invalid_request"
    http_status = 400


class InvalidRequestError(RequestError):
    """A field is missing, unknown, of the wrong type or out of its range."""


class MalformedMessageError(RequestError):
    """A message that is no request: undecodable, of a refused content type, or for an unknown task."""

    code = "malformed_message"


class PayloadTooLargeError(RequestError):
    """The encoded request exceeds `queue.max_payload_mb`."""

    code = "payload_too_large"
    http_status = 413


class ModelNotFoundError(RequestError):
    """The catalog has no model of that name."""

    code = "model_not_found"
    http_status = 404


class UnsupportedTaskError(RequestError):
    """The model does not serve the task that was asked for."""

    code = "unsupported_task"


class InputTooLongError(RequestError):
    """The input has more tokens than the model, or the batch's token cap, admits."""

    code = "input_too_long"


class IdempotencyConflictError(RequestError):
    """The idempotency key was used before with other content."""

    code = "idempotency_conflict"
    http_status = 409


class RequestNotFoundError(RequestError):
    """No request of that id is known: never submitted, or its result has expired."""

    code = "request_not_found"
    http_status = 404


class InvalidConfigError(RequestError):
    """A change of the configuration that would make it wrong; `problems` has a line for each key."""

    code = "invalid_config"
    http_status = 422


class ConfigConflictError(RequestError):
    """Somebody else changed the configuration meanwhile."""

    code = "config_conflict"
    http_status = 409


class UnknownVersionError(RequestError):
    """The runtime configuration has, or keeps, no version of that number."""

    code = "unknown_config_version"
    http_status = 404


class CapacityError(MuaiError):
    """Full: refused before anything was enqueued."""

    code = "over_capacity"
    retryable = True
    http_status = 429

    @property
    def retry_after_s(self) -> float:
        """Seconds after which room is likely, from the current rate of completion."""
        return float(self.details.get("retry_after_s", 1.0))


class QueueFullError(CapacityError):
    """As many requests as `monitoring.server.queue_capacity` (or a model's or tenant's limit) are in flight."""

    code = "queue_full"


class EngineError(MuaiError):
    """An engine could not serve the request; the next engine of the chain may."""

    code = "engine_error"
    retryable = True
    http_status = 502


class EngineUnavailableError(EngineError):
    """The engine's library, device or worker is not there."""

    code = "engine_unavailable"
    http_status = 503


class ModelLoadError(EngineError):
    """The engine could not load the model."""

    code = "model_load_failed"


class OutOfMemoryError(EngineError):
    """The device had too little memory, even for this request alone."""

    code = "out_of_memory"


class InferenceFailedError(EngineError):
    """The engine raised while it ran the request."""

    code = "inference_failed"


class UnsupportedParameterError(EngineError):
    """The engine cannot do what one of the request's parameters asks for; another engine may."""

    code = "unsupported_parameter"
    http_status = 400


class BrokerError(MuaiError):
    """The broker or the state store did not answer; retried in place."""

    code = "broker_unavailable"
    retryable = True
    http_status = 503


class TerminalError(MuaiError):
    """The end of a request that was accepted and will get no output."""

    code = "failed"


class EnginesExhaustedError(TerminalError):
    """Every engine of the chain was tried or skipped; `attempts` says what each of them answered."""

    code = "engines_exhausted"
    http_status = 502

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """One mapping per engine, in order: `engine`, `error` (a wire error)."""
        return list(self.details.get("attempts", []))


class PoisonedRequestError(TerminalError):
    """The request was running when its worker died, `queue.max_deliveries` times."""

    code = "poisoned_request"


class DeadlineExceededError(TerminalError):
    """The request's deadline passed before it was answered."""

    code = "deadline_exceeded"
    http_status = 504


class RequestCancelledError(TerminalError):
    """The request was cancelled by its client."""

    code = "cancelled"
    http_status = 409


class ResultTimeoutError(MuaiError, TimeoutError):
    """The caller's own wait ran out; the request goes on."""

    code = "result_timeout"
    retryable = True
    http_status = 504


def _tree(root: type[MuaiError]) -> dict[str, type[MuaiError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


@functools.cache
def classes_by_code() -> dict[str, type[MuaiError]]:
    """The class of each code; where a class inherits its parent's, the parent."""
    found: dict[str, type[MuaiError]] = {}
    for error_class in _tree(MuaiError).values():
        found.setdefault(error_class.code, error_class)
    return found


def error_from_wire(wire: Mapping[str, Any]) -> MuaiError:
    """Rebuild an error from `MuaiError.to_wire`; an unknown type becomes its nearest known parent, `MuaiError`."""
    error_class = _tree(MuaiError).get(str(wire.get("type")), MuaiError)
    return error_class(str(wire.get("message", "")), wire.get("details") or {})
