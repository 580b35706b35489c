"""What the workflow paths take and give."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from muai_producers.store import RECEIVED


class WorkflowBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What starts a run."""

    parameters: dict[str, Any]
    """What the workflow takes: `GET /v1/workflows` has each one's schema."""
    timeout_s: Annotated[float, Meta(gt=0.0)] | None = None
    """Longest that the run may take; at most `workflows.timeout_s`, which null stands for."""


class WorkflowReceipt(msgspec.Struct, frozen=True, kw_only=True):
    """A run was started."""

    id: str
    status_url: str
    state: str = RECEIVED


class WorkflowEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One workflow."""

    name: str
    description: str
    parameters: dict[str, Any]
    """JSON schema."""


class WorkflowList(msgspec.Struct, frozen=True, kw_only=True):
    """The workflows."""

    data: list[WorkflowEntry]
