"""Where a request stands, as clients read it. Results pass through undecoded, whatever their size."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from muai_producers.errors import MuaiError
from muai_producers.store import FAILURE, PENDING, REVOKED, SUCCESS, TERMINAL, StoredState, outcome_of

State = Literal["PENDING", "RECEIVED", "BATCHED", "STARTED", "RETRY", "SUCCESS", "FAILURE", "REVOKED"]


class RequestFailure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a request ended without a result."""

    type: str
    code: str
    message: str
    retryable: bool
    """Whether the same request may succeed later."""
    details: dict[str, Any]
    """`attempts` says what each engine answered, where engines were tried."""


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """Where a request stands."""

    id: str
    state: str
    """SUCCESS, FAILURE and REVOKED are final."""
    status_url: str
    result: msgspec.Raw | None = None
    """Of SUCCESS, the result; else null."""
    error: RequestFailure | None = None
    """Of FAILURE and REVOKED, the error; else null."""
    progress: msgspec.Raw | None = None
    """Of the other states, what is known by now, such as the batch and the engine."""

    @property
    def finished(self) -> bool:
        """Whether the state is final."""
        return self.state in TERMINAL


_read = msgspec.json.Decoder(StoredState).decode


def status_url(request_id: str) -> str:
    """The path at which the request can be asked for."""
    return f"/v1/inference/{request_id}"


def read_standing(request_id: str, meta: bytes | None) -> Standing:
    """Read the stored state; None is a request that is in flight and nobody has touched yet."""
    return read_owned(request_id, meta)[0]


def read_owned(request_id: str, meta: bytes | None) -> tuple[Standing, str]:
    """As `read_standing`, with the tenant whose request it is; '' where the state does not say."""
    if meta is None:
        return Standing(id=request_id, state=PENDING, status_url=status_url(request_id)), ""
    stored = _read(meta)
    return standing_of(request_id, stored), stored.tenant


def standing_of(request_id: str, stored: StoredState) -> Standing:
    """As `read_standing`, for a state that is decoded so far."""
    url = status_url(request_id)
    if stored.status == SUCCESS:
        return Standing(id=request_id, state=SUCCESS, status_url=url, result=stored.result)
    if stored.status in (FAILURE, REVOKED):
        outcome = outcome_of(stored)
        assert isinstance(outcome, MuaiError)
        failure = msgspec.convert(outcome.to_wire(), RequestFailure)
        return Standing(id=request_id, state=stored.status, status_url=url, error=failure)
    return Standing(id=request_id, state=stored.status, status_url=url, progress=stored.result)
