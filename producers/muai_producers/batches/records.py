"""What is kept of a batch, and how callers see it."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from muai_producers.errors import CapacityError, RequestError
from muai_producers.keys import NO_LIMITS, TenantLimits

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
ENDED: frozenset[str] = frozenset({"failed", "completed", "expired", "cancelled"})
MetadataKey = Annotated[str, Meta(min_length=1, max_length=64)]
MetadataValue = Annotated[str, Meta(max_length=512)]
MAX_WINDOW_S = 7 * 86_400


class UnknownBatchError(RequestError):
    """No batch of that id is known."""

    code = "batch_not_found"
    http_status = 404


class BatchEndedError(RequestError):
    """What has ended cannot be cancelled."""

    code = "already_finished"
    http_status = 409


class TooManyBatchesError(CapacityError):
    """The tenant has as many open batches as it may."""

    code = "too_many_batches"


class BatchBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A batch to be made."""

    input_file_id: Annotated[str, Meta(min_length=1, max_length=256)]
    """A file uploaded with the purpose `batch`: one request a line."""
    endpoint: Endpoint
    """The endpoint that every line is for."""
    completion_window: Annotated[str, Meta(pattern="^[1-9][0-9]{0,5}[hm]$")] = "24h"
    """Hours or minutes, `168h` at most; what is not done after it is not done any more."""
    metadata: Annotated[dict[MetadataKey, MetadataValue], Meta(max_length=16)] | None = None


class BatchProblem(msgspec.Struct, frozen=True, kw_only=True):
    """What is wrong with an input file."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None
    """The line's number, from 1."""


class BatchProblems(msgspec.Struct, frozen=True, kw_only=True):
    """What is wrong with an input file, the first of it."""

    object: str = "list"
    data: tuple[BatchProblem, ...]


class RequestCounts(msgspec.Struct, frozen=True, kw_only=True):
    """How many lines there are, and how many of them have ended."""

    total: int
    completed: int
    failed: int


class BatchObject(msgspec.Struct, frozen=True, kw_only=True):
    """A batch, in OpenAI's shape. Times are wall-clock seconds since the epoch."""

    id: str
    object: str = "batch"
    endpoint: Endpoint
    errors: BatchProblems | None
    input_file_id: str
    completion_window: str
    status: Status
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None


class BatchList(msgspec.Struct, frozen=True, kw_only=True):
    """A page of batches."""

    object: str = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class OpenLine(msgspec.Struct, frozen=True, kw_only=True):
    """A line whose requests are in the queue."""

    number: int
    custom_id: str
    offset: int
    num_bytes: int
    """Where it stands in the input file, to be read again where its requests are lost."""
    request_ids: tuple[str, ...]
    num_tries: int = 1


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """What one process has written of the answers. Bytes after these were never told of, and do not count."""

    owner: str
    output_bytes: int = 0
    error_bytes: int = 0


class BatchRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is kept of a batch: all that it takes to go on after any process died."""

    id: str
    tenant: str
    body: BatchBody
    created_at: int
    expires_at: int
    status: Status = "validating"
    limits: TenantLimits = NO_LIMITS
    problems: tuple[BatchProblem, ...] = ()
    times: dict[str, int] = {}
    """When each status was reached, by its name."""
    total: int = 0
    completed: int = 0
    failed: int = 0
    next_offset: int = 0
    """Where the first line stands that nothing was done about."""
    next_line: int = 1
    open_lines: tuple[OpenLine, ...] = ()
    segments: tuple[Segment, ...] = ()
    ending: Status = "completed"
    """The status after finalizing."""
    output_file_id: str | None = None
    error_file_id: str | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more will be done."""
        return self.status in ENDED

    @property
    def num_left(self) -> int:
        """Lines that have not ended; 0 before they have been counted."""
        return self.total - self.completed - self.failed

    def shown(self, cancelling_at: int | None = None) -> BatchObject:
        """As callers see it.

        Args:
            cancelling_at: when somebody asked to cancel it; None: nobody did.
        """
        status = "cancelling" if cancelling_at is not None and not self.ended else self.status
        at = self.times.get
        return BatchObject(
            id=self.id,
            endpoint=self.body.endpoint,
            errors=BatchProblems(data=self.problems) if self.problems else None,
            input_file_id=self.body.input_file_id,
            completion_window=self.body.completion_window,
            status=status,
            output_file_id=self.output_file_id,
            error_file_id=self.error_file_id,
            created_at=self.created_at,
            in_progress_at=at("in_progress"),
            expires_at=self.expires_at,
            finalizing_at=at("finalizing"),
            completed_at=at("completed"),
            failed_at=at("failed"),
            expired_at=at("expired"),
            cancelling_at=cancelling_at,
            cancelled_at=at("cancelled"),
            request_counts=RequestCounts(total=self.total, completed=self.completed, failed=self.failed),
            metadata=self.body.metadata,
        )


def window_s(window: str) -> int:
    """Seconds of a completion window such as `24h`."""
    return int(window[:-1]) * (3600 if window.endswith("h") else 60)
