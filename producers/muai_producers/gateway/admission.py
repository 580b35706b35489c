"""Admission of many clients' requests in one step, in which one client's refusal is nobody else's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import redis

from muai_producers.errors import BrokerError, MuaiError, QueueFullError
from muai_producers.gateway.results import ResultHub
from muai_producers.store import Store
from muai_producers.wire import InferenceRequest

log = logging.getLogger(__name__)
Submit = Callable[[Sequence[InferenceRequest]], list[str]]
"""Admits all requests or none, and returns their ids; raises as `Submitter.submit`."""


@dataclass(frozen=True, slots=True)
class Submission:
    """One client's request on its way in."""

    request: InferenceRequest
    awaited: bool
    """Whether the client waits for the result; then the result is listened for before the request is sent."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """A request that the queue has."""

    request_id: str
    """Another than was sent, where the idempotency key was known."""
    queue_position: int | None
    """Requests in flight just after this one was accepted; None where nobody asked, or it was accepted earlier."""


class Admission:
    """Runs on one thread: see `admit`."""

    def __init__(self, submit: Submit, store: Store, hub: ResultHub) -> None:
        self._submit = submit
        self._store = store
        self._hub = hub

    def admit(self, submissions: Sequence[Submission]) -> list[Accepted | MuaiError]:
        """Submit each request; the outcomes are in order, each its own."""
        awaited = [submission.request.id for submission in submissions if submission.awaited]
        watch = self._hub.listen(awaited) if awaited else None
        outcomes = admit_each(self._submit, [submission.request for submission in submissions])
        if watch is not None:
            accepted = {outcome for outcome in outcomes if isinstance(outcome, str)}
            kept = [request_id for request_id in awaited if request_id in accepted]
            if len(kept) < len(awaited):  # what was refused would be listened for as long as the gateway lives
                self._hub.listen(kept)
                watch.close()
        position = self._position(submissions)
        return [
            outcome
            if isinstance(outcome, MuaiError)
            else Accepted(outcome, position if outcome == submission.request.id else None)
            for submission, outcome in zip(submissions, outcomes, strict=True)
        ]

    def _position(self, submissions: Sequence[Submission]) -> int | None:
        if all(submission.awaited for submission in submissions):
            return None
        try:
            return self._store.in_flight()
        except redis.RedisError:
            return None  # the requests are accepted all the same


def admit_each(submit: Submit, requests: Sequence[InferenceRequest]) -> list[str | MuaiError]:
    """Submit requests together where possible; what is refused for one of them is found by halving.

    So n requests of which k are refused take about k·log n calls, and one where none is.
    """
    if not requests:
        return []
    try:
        return list(submit(requests))
    except BrokerError as error:
        # Not tried one by one: that would ask a broker that is gone once for each of them.
        return [BrokerError(error.message) for _ in requests]
    except QueueFullError as error:
        if len(requests) == 1:
            return [_full(error)]
        return _admit_what_fits(submit, requests, error)
    except MuaiError as error:
        if len(requests) == 1:
            return [error]
    except Exception:
        if len(requests) == 1:
            log.exception("request %s could not be submitted", requests[0].id)
            return [MuaiError("the request could not be submitted, through no fault of its own")]
    return _admit_halves(submit, requests)


def _admit_halves(submit: Submit, requests: Sequence[InferenceRequest]) -> list[str | MuaiError]:
    middle = len(requests) // 2
    return admit_each(submit, requests[:middle]) + admit_each(submit, requests[middle:])


def _admit_what_fits(
    submit: Submit, requests: Sequence[InferenceRequest], error: QueueFullError
) -> list[str | MuaiError]:
    """Over the limit of all requests together nobody needs to be asked one by one: the room is known.

    Requests with an idempotency key are: one that was accepted earlier needs no room.
    """
    room = int(error.details["allowed"]) - int(error.details["in_flight"])
    if error.details["limit"] != "queue_capacity" or room > 0:
        return _admit_halves(submit, requests)
    refusal = _full(error)
    return [refusal if request.idempotency_key is None else admit_each(submit, [request])[0] for request in requests]


def _full(error: QueueFullError) -> QueueFullError:
    """The refusal as one client may see it."""
    details = {name: error.details[name] for name in ("limit", "allowed", "in_flight", "retry_after_s")}
    told = f"full: {details['in_flight']} of {details['allowed']} requests are in flight ({details['limit']})"
    return QueueFullError(f"{told}; try again later", details)
