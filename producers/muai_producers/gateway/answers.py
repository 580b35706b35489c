"""The bodies of answers that are neither a standing, a verdict nor an error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from muai_producers.errors import InvalidRequestError, MuaiError
from muai_producers.gateway.admission import Accepted
from muai_producers.gateway.standing import status_url
from muai_producers.store import PENDING

if TYPE_CHECKING:
    from muai_config import Settings


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """The queue has the request."""

    id: str
    status_url: str
    state: str
    queue_position: int | None = None
    """Requests in flight just after this one was accepted, so that at most so many, less one, are before it; null
    where the answer was waited for, and for a request that was accepted earlier under the same Idempotency-Key."""
    estimated_wait_s: float | None = None
    """How long as many requests take at the pace of the last half minute; null while there is none."""


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """Why one request of many was not accepted."""

    code: str
    message: str
    retryable: bool
    """Whether the same request may be accepted later."""
    details: dict[str, Any]


class ManyItem(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one request of many: a receipt or an error."""

    index: int
    """Its place in the list that was sent."""
    receipt: Receipt | None = None
    error: Refusal | None = None


class ManyReceipts(msgspec.Struct, frozen=True, kw_only=True):
    """What became of each of many requests, in the order in which they were sent."""

    object: str = "list"
    accepted: int
    refused: int
    data: list[ManyItem]


class ModelEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A model of the catalog."""

    id: str
    object: str = "model"
    created: int = 0
    """OpenAI's clients want a time; the catalog keeps none."""
    owned_by: str = "muai"
    task: str
    engines: list[str]
    """Those that may serve it, preferred first."""
    max_input_tokens: int | None
    """null: the model's own limit."""


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """The catalog."""

    object: str = "list"
    data: list[ModelEntry]


def catalog(settings: Settings) -> ModelList:
    """The models that may be asked for."""
    return ModelList(
        data=[
            ModelEntry(
                id=name, task=spec.task, engines=list(settings.chain(spec)), max_input_tokens=spec.max_input_tokens
            )
            for name, spec in sorted(settings.models.items())
        ]
    )


def receipt_of(accepted: Accepted, state: str = PENDING) -> Receipt:
    """The receipt of an accepted request."""
    return Receipt(
        id=accepted.request_id,
        status_url=status_url(accepted.request_id),
        state=state,
        queue_position=accepted.queue_position,
        estimated_wait_s=None if accepted.estimated_wait_s is None else round(accepted.estimated_wait_s, 3),
    )


def many_receipts(outcomes: Sequence[Accepted | MuaiError]) -> ManyReceipts:
    """What became of many requests.

    Raises:
        MuaiError: none was accepted: the error of one that may be later, where there is one.
    """
    errors = [outcome for outcome in outcomes if isinstance(outcome, MuaiError)]
    if len(errors) == len(outcomes):
        _raise_for_all(errors)
    data = [
        ManyItem(index=index, error=_refusal(outcome))
        if isinstance(outcome, MuaiError)
        else ManyItem(index=index, receipt=receipt_of(outcome))
        for index, outcome in enumerate(outcomes)
    ]
    return ManyReceipts(accepted=len(data) - len(errors), refused=len(errors), data=data)


def _raise_for_all(errors: Sequence[MuaiError]) -> NoReturn:
    for error in errors:
        if error.retryable:
            raise error  # the same answer as to one request: its status, and Retry-After
    told = [{"index": index, "code": error.code, "message": error.message} for index, error in enumerate(errors)]
    raise InvalidRequestError(
        f"none of the {len(errors)} requests was accepted; the first: {errors[0].message}", {"requests": told}
    )


def _refusal(error: MuaiError) -> Refusal:
    return Refusal(code=error.code, message=error.message, retryable=error.retryable, details=error.details)
