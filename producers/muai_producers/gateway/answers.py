"""The bodies of answers that are neither a standing, a verdict nor an error."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

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
