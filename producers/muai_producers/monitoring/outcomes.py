"""How requests end, as metrics say it."""

from __future__ import annotations

from muai_producers.errors import (
    CapacityError,
    DeadlineExceededError,
    MuaiError,
    RequestCancelledError,
    RequestError,
)
from muai_producers.monitoring import instruments
from muai_producers.monitoring.instruments import NO_ENGINE
from muai_producers.monitoring.recorder import Recorder

SUCCESS, FAILURE, REFUSED, EXPIRED, CANCELLED = "success", "failure", "refused", "expired", "cancelled"


def status_of(error: MuaiError) -> str:
    """The status of a request that ended with `error`: `refused` is the request's own fault, `failure` ours."""
    if isinstance(error, RequestCancelledError):
        return CANCELLED
    if isinstance(error, DeadlineExceededError):
        return EXPIRED
    return REFUSED if isinstance(error, RequestError | CapacityError) else FAILURE


def record_failure(recorder: Recorder, model: str, tenant: str, error: MuaiError, engine: str = NO_ENGINE) -> None:
    """A request has ended without a result.

    Args:
        model: of the catalog, or `UNKNOWN`.
    """
    status = status_of(error)
    recorder.count(instruments.REQUESTS, model, engine, status)
    recorder.count(instruments.TENANT_REQUESTS, tenant, status)
