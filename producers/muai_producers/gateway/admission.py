"""Admission of many clients' requests in one step, in which one client's refusal is nobody else's."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import redis

from muai_producers.errors import BrokerError, MuaiError, QueueFullError
from muai_producers.gateway.pace import Pace
from muai_producers.gateway.results import ResultHub
from muai_producers.keys import NO_LIMITS, TenantLimits
from muai_producers.monitoring import instruments
from muai_producers.monitoring.outcomes import status_of
from muai_producers.monitoring.recorder import recorder
from muai_producers.store import Limits, Store
from muai_producers.wire import InferenceRequest

log = logging.getLogger(__name__)
Submit = Callable[[Sequence[InferenceRequest]], list[str]]
SubmitWithin = Callable[[Sequence[InferenceRequest], Limits], list[str]]
"""Admits all requests or none, and returns their ids; raises as `Submitter.submit`."""
LOOK_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class Submission:
    """One client's request on its way in."""

    request: InferenceRequest
    awaited: bool
    """Whether the client waits for the result; then the result is listened for before the request is sent."""
    limits: TenantLimits = NO_LIMITS


@dataclass(frozen=True, slots=True)
class Accepted:
    """A request that the queue has."""

    request_id: str
    """Another than was sent, where the idempotency key was known."""
    queue_position: int | None
    """Requests in flight just after this one was accepted; None where it is awaited, or was accepted earlier."""
    estimated_wait_s: float | None = None
    """How long so many take at the present pace; None while nothing is known of it."""


class Admission:
    """Runs on one thread: see `admit`.

    Args:
        limits: gives what holds now for tenants whose keys say nothing else.
    """

    def __init__(self, submit: SubmitWithin, store: Store, hub: ResultHub, limits: Callable[[], Limits]) -> None:
        self._submit = submit
        self._store = store
        self._hub = hub
        self._limits = limits
        self._pace = Pace()
        self._in_flight: int | None = None

    def admit(self, submissions: Sequence[Submission]) -> list[Accepted | MuaiError]:
        """Submit each request; the outcomes are in order, each its own."""
        awaited = [submission.request.id for submission in submissions if submission.awaited]
        watch = self._hub.listen(awaited) if awaited else None
        outcomes = self._admit_by_limits(submissions)
        if watch is not None:
            accepted = {outcome for outcome in outcomes if isinstance(outcome, str)}
            kept = [request_id for request_id in awaited if request_id in accepted]
            if len(kept) < len(awaited):  # what was refused would be listened for as long as the gateway lives
                self._hub.listen(kept)
                watch.close()
        _record_refusals(submissions, outcomes)
        self._look(is_asked=len(awaited) < len(submissions))
        return [self._told(submission, outcome) for submission, outcome in zip(submissions, outcomes, strict=True)]

    def _admit_by_limits(self, submissions: Sequence[Submission]) -> list[str | MuaiError]:
        """Requests whose tenants have the same limits go together: one step for each set of limits."""
        places: dict[tuple[int | None, int | None], list[int]] = {}
        for place, submission in enumerate(submissions):
            limits = submission.limits
            places.setdefault((limits.max_requests, limits.max_tokens), []).append(place)
        outcomes: dict[int, str | MuaiError] = {}
        for (max_requests, max_tokens), group in places.items():
            submit = self._submit_within(self._within(max_requests, max_tokens))
            outcomes |= zip(group, admit_each(submit, [submissions[place].request for place in group]), strict=True)
        return [outcomes[place] for place in range(len(submissions))]

    def _submit_within(self, limits: Limits) -> Submit:
        return lambda requests: self._submit(requests, limits)

    def _within(self, max_requests: int | None, max_tokens: int | None) -> Limits:
        own = {"tenant_max_requests": max_requests, "tenant_max_tokens": max_tokens}
        return dataclasses.replace(self._limits(), **{name: value for name, value in own.items() if value is not None})

    def _look(self, *, is_asked: bool) -> None:
        """See how many are in flight, where somebody asked; and how fast they are answered, now and then."""
        now_s = time.monotonic()
        if not is_asked and self._pace.age_s(now_s) < LOOK_EVERY_S:
            return
        try:
            self._in_flight, answered = self._store.progress()
        except redis.RedisError:
            self._in_flight = None  # the requests are accepted all the same
            return
        if self._pace.age_s(now_s) >= LOOK_EVERY_S:
            self._pace.saw(answered, now_s)

    def _told(self, submission: Submission, outcome: str | MuaiError) -> Accepted | MuaiError:
        if isinstance(outcome, QueueFullError):
            return self._with_time(outcome)
        if isinstance(outcome, MuaiError):
            return outcome
        is_told = outcome == submission.request.id and not submission.awaited
        position = self._in_flight if is_told else None
        return Accepted(outcome, position, None if position is None else self._pace.wait_s(position))

    def _with_time(self, error: QueueFullError) -> QueueFullError:
        """The refusal with the time after which a twentieth of what is in flight will have been answered.

        Not one request's time: whoever was refused is seldom alone, and all come back at once.
        """
        wait_s = self._pace.wait_s(max(1, int(error.details["in_flight"]) // 20))
        if wait_s is None:
            return error
        return QueueFullError(error.message, {**error.details, "retry_after_s": round(max(1.0, wait_s), 1)})


def _record_refusals(submissions: Sequence[Submission], outcomes: Sequence[str | MuaiError]) -> None:
    for submission, outcome in zip(submissions, outcomes, strict=True):
        if isinstance(outcome, MuaiError):
            recorder.count(instruments.REFUSED, outcome.code)
            recorder.count(instruments.TENANT_REQUESTS, submission.request.tenant, status_of(outcome))


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
