"""The client of a web app: submit inference requests, then poll, await or cancel them by id."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import redis

from muai_producers import errors
from muai_producers.connections import state_client
from muai_producers.listening import ResultListener
from muai_producers.request_ids import new_owner, new_request_id, owner_of
from muai_producers.runtime_config.live import LiveSettings
from muai_producers.runtime_config.looking import Looker
from muai_producers.runtime_config.versions import ConfigVersions
from muai_producers.store import (
    PENDING,
    REVOKED,
    SUCCESS,
    TERMINAL,
    Limits,
    Store,
    StoredState,
    failure_answer,
    outcome_of,
    read_state,
)
from muai_producers.streams.following import Follower
from muai_producers.streams.listening import StreamListener, Wake
from muai_producers.streams.text import StreamEvent
from muai_producers.submit import KombuSubmitter, RedisSubmitter, Submitter
from muai_producers.tracing.context import Trace, current_trace
from muai_producers.wire import (
    DEFAULT_PRIORITY,
    InferenceRequest,
    InferenceResult,
    request_from_fields,
)

if TYPE_CHECKING:
    from muai_config import Settings

Inputs = str | Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""A text, chat messages, or the `inputs` mapping itself."""

FETCH_CHUNK = 500


@dataclass(frozen=True)
class RequestStatus:
    """Where a request stands.

    `state` is one of PENDING (known to nobody yet, or forgotten), RECEIVED, BATCHED, STARTED, RETRY, SUCCESS,
    FAILURE, REVOKED.
    """

    request_id: str
    state: str
    info: dict[str, Any]
    """Of a passing state, what is known of it; of FAILURE and REVOKED, the error."""

    @property
    def finished(self) -> bool:
        """Whether the state is terminal."""
        return self.state in TERMINAL


def limits_of(settings: Settings) -> Limits:
    """The limits that the configuration sets for everybody."""
    return Limits(
        queue_capacity=settings.monitoring.server.queue_capacity,
        tenant_max_requests=settings.queue.tenant_max_requests,
        tenant_max_tokens=settings.queue.tenant_max_tokens,
        model_max_requests=settings.queue.model_max_requests,
    )


class InferenceClient:
    """Submits requests and fetches their results. Safe to share between threads; one per process is enough.

    Args:
        settings: as `muai_config.load_settings()` gives them, which is what None stands for.
        live: the settings of a process that follows their changes; None: the client looks for changes itself, once a
            second while it submits.
    """

    def __init__(self, settings: Settings | None = None, live: LiveSettings | None = None) -> None:
        if settings is None:
            from muai_config import load_settings

            settings = load_settings()
        self._live = live or LiveSettings(settings)
        self._redis = state_client(settings.queue.state_url)
        self.store = Store(self._redis, prefix=settings.queue.key_prefix, result_ttl_s=settings.queue.result_ttl_s)
        self._look = None if live is not None else Looker(self._live, ConfigVersions(self.store))
        self._submitter: Submitter | None = None
        self._client_id = new_owner()
        self._reply_channel = self.store.keys.reply_channel(self._client_id)
        self._listener = ResultListener(self._redis, self.store, self._reply_channel)
        self._streams = StreamListener(self._redis, self.store)

    def __enter__(self) -> InferenceClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def settings(self) -> Settings:
        """What the client works by now."""
        return self._live.current

    @property
    def limits(self) -> Limits:
        """How much may be in flight, by what is configured now."""
        return limits_of(self._live.current)

    def close(self) -> None:
        """Close connections and end the listening thread. What was submitted goes on."""
        self._listener.close()
        self._streams.close()
        if self._submitter is not None:
            self._submitter.close()
        self._redis.close()

    def submit(self, model: str, inputs: Inputs, **options: Any) -> str:
        """Submit one request.

        Args:
            inputs: a text, a list of chat messages (`role`, `content`), or a mapping with the task's own key.
            options: `task`, `parameters` (mapping or `Parameters`), `priority`, `deadline_s` (seconds from now),
                `conversation_id`, `tenant`, `idempotency_key`, `engine_preference`, `stream` (tell the text as it is
                generated; see the method `stream`).
        Returns:
            the request's id, which is its Celery task id.
        Raises:
            InvalidRequestError: an option is unknown, of the wrong type or out of range.
            PayloadTooLargeError: over `queue.max_payload_mb`.
            QueueFullError: over capacity; nothing was enqueued.
            IdempotencyConflictError: the key was used with other content.
            BrokerError: broker or state store do not answer; nothing was enqueued.
        """
        return self.submit_many([{"model": model, "inputs": inputs, **options}])[0]

    def submit_many(self, requests: Iterable[Mapping[str, Any] | InferenceRequest]) -> list[str]:
        """Submit many at once, at a fraction of the cost of one by one; each mapping holds `submit`'s arguments.

        Returns:
            the ids, in order.
        Raises:
            QueueFullError: `details["accepted"]` has the ids that were accepted before capacity ran out.
            others: as `submit`; a request that is invalid by itself refuses the whole call before anything is sent.
        """
        return self._send(self._build_all(requests))

    def _send(self, built: Sequence[InferenceRequest]) -> list[str]:
        return self.submitter().submit(built, self.limits) if built else []

    def _build_all(self, requests: Iterable[Mapping[str, Any] | InferenceRequest]) -> list[InferenceRequest]:
        if self._look is not None:
            self._look.look_now_and_then()
        now_s = time.time()
        trace = current_trace()
        return [
            request if isinstance(request, InferenceRequest) else self._build(request, now_s, trace)
            for request in requests
        ]

    def _build(self, options: Mapping[str, Any], now_s: float, trace: Trace) -> InferenceRequest:
        fields = dict(options)
        inputs = fields.get("inputs")
        if isinstance(inputs, str):
            fields["inputs"] = {"text": inputs}
        elif isinstance(inputs, Sequence):
            fields["inputs"] = {"messages": list(inputs)}
        deadline_s = fields.pop("deadline_s", None)
        if deadline_s is None:
            deadline_s = self.settings.queue.default_deadline_s
        if deadline_s is not None and fields.get("deadline") is None:
            if isinstance(deadline_s, bool) or not isinstance(deadline_s, int | float):
                raise errors.InvalidRequestError(f"deadline_s must be a number of seconds, got {deadline_s!r}")
            fields["deadline"] = now_s + deadline_s
        fields["reply_to"] = self._reply_channel
        if trace and not fields.get("trace"):
            fields["trace"] = trace
        return self._packed(
            request_from_fields(fields, request_id=fields.get("id") or new_request_id(self._client_id), now_s=now_s)
        )

    def _packed(self, request: InferenceRequest) -> InferenceRequest:
        """Have an embedding travel as base64, which is unpacked here, unless something else is asked for; a webhook is
        told numbers.
        """
        model = self.settings.models.get(request.model)
        task = request.task or (None if model is None else model.task)
        if task != "embedding" or request.webhook is not None or request.parameters.encoding_format is not None:
            return request
        parameters = msgspec.structs.replace(request.parameters, encoding_format="base64")
        return msgspec.structs.replace(request, parameters=parameters)

    def watch(self, request_ids: Sequence[str], on_done: Callable[[list[str]], None]) -> Callable[[], None]:
        """Call `on_done`, from the listening thread, with each list of these ids that have finished.

        What finished before the call is not named: look at the store once afterwards.

        Returns:
            call it to stop.
        """
        own = [request_id for request_id in request_ids if self._is_own(request_id)]
        foreign = [request_id for request_id in request_ids if not self._is_own(request_id)]
        watches = [self._listener.watch(ids, on_done, own=ids is own) for ids in (own, foreign) if ids]

        def close() -> None:
            for watch in watches:
                watch.close()

        return close

    def _is_own(self, request_id: str) -> bool:
        return owner_of(request_id) == self._client_id

    def submitter(self) -> Submitter:
        """What publishes this client's requests: one atomic script where broker and state store are one Redis."""
        if self._submitter is None:
            self._submitter = _submitter(self.settings, self.store)
        return self._submitter

    def status(self, request_id: str) -> RequestStatus:
        """Where a request stands; PENDING also for an id that nobody knows."""
        state = self._states([request_id])[0]
        if state is None:
            return RequestStatus(request_id, PENDING, {})
        info = {} if state.status == SUCCESS else msgspec.json.decode(state.result) or {}
        return RequestStatus(request_id, state.status, info)

    def result(self, request_id: str, timeout_s: float | None = None) -> InferenceResult:
        """Wait for a request's result.

        Args:
            timeout_s: longest wait; None waits for ever, 0 only looks.
        Raises:
            ResultTimeoutError: not finished in time; the request goes on.
            MuaiError: what the request ended with.
        """
        return _result_of(self.results([request_id], timeout_s))

    def results(
        self, request_ids: Iterable[str], timeout_s: float | None = None
    ) -> Iterator[tuple[str, InferenceResult | errors.MuaiError]]:
        """Yield `(id, outcome)` of each request as it finishes; failures are yielded, not raised.

        Raises:
            ResultTimeoutError: `timeout_s` has passed since the first call; `details["open"]` has the ids left.
        """
        called_s = time.monotonic()
        remaining = dict.fromkeys(request_ids)
        if not (self._listener.is_listening and all(map(self._is_own, remaining))):
            # To begin to listen costs more than a look, which may be all that it takes.
            yield from self.finished(list(remaining), remaining)
        arrived: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
        arrived.put(list(remaining))  # what has finished before it is listened for
        stop_watching = self.watch(list(remaining), arrived.put)
        try:
            yield from self._arriving(arrived, remaining, timeout_s, called_s)
        finally:
            stop_watching()

    def _arriving(
        self,
        arrived: queue.SimpleQueue[list[str]],
        remaining: dict[str, None],
        timeout_s: float | None,
        called_s: float,
    ) -> Iterator[tuple[str, InferenceResult | errors.MuaiError]]:
        """Yield what is named in `arrived`, until nothing remains."""
        deadline_s = None if timeout_s is None else called_s + timeout_s
        while remaining:
            try:
                ids = arrived.get(timeout=None if deadline_s is None else max(0.0, deadline_s - time.monotonic()))
            except queue.Empty:
                raise still_open(remaining, timeout_s) from None
            with contextlib.suppress(queue.Empty):
                while True:  # what has finished since is fetched in the same round trip
                    ids += arrived.get_nowait()
            yield from self.finished(ids, remaining)

    def finished(
        self, ids: Sequence[str], remaining: dict[str, None]
    ) -> Iterator[tuple[str, InferenceResult | errors.MuaiError]]:
        """Of `ids`, yield those in `remaining` that are terminal, and take them out of it."""
        wanted = [request_id for request_id in ids if request_id in remaining]
        for start in range(0, len(wanted), FETCH_CHUNK):
            chunk = wanted[start : start + FETCH_CHUNK]
            for request_id, state in zip(chunk, self._states(chunk), strict=True):
                if state is not None and state.status in TERMINAL and request_id in remaining:
                    del remaining[request_id]
                    yield request_id, outcome_of(state)

    def stream(
        self, request_id: str, after: str | None = None, timeout_s: float | None = None
    ) -> Iterator[StreamEvent]:
        """Yield a request's text as it is generated, then its result.

        Joined, the texts since the last `restart` are the text of the result, whatever happened to the workers. A
        request that was not submitted with `stream`, or is finished, gives its whole text at once, and one whose task
        gives no text gives its result alone.

        Args:
            after: the `offset` of an event: read on after it, in this process or another, as if nothing had happened.
            timeout_s: longest wait for the next event; None waits for ever.
        Raises:
            InvalidRequestError: `after` is no offset.
            ResultTimeoutError: nothing came for `timeout_s`; the request goes on.
            MuaiError: what the request ended with.
        """
        woken = threading.Event()
        follower = self.follow(request_id, after, woken.set)
        try:
            while True:
                woken.clear()
                yield from follower.take()
                if follower.error is not None:
                    raise follower.error
                if follower.finished:
                    return
                if not woken.wait(timeout_s):
                    raise still_open([request_id], timeout_s)
        finally:
            follower.close()

    def follow(self, request_id: str, after: str | None, wake: Wake) -> Follower:
        """What `stream` reads from; `wake` is called from the listening thread when there may be more."""
        return Follower(self._streams, request_id, after, wake)

    def _states(self, ids: Sequence[str]) -> list[StoredState | None]:
        carried = [self._listener.take_carried(request_id) for request_id in ids]
        unknown = [request_id for request_id, meta in zip(ids, carried, strict=True) if meta is None]
        try:
            fetched = iter(self.store.states(unknown))
        except redis.RedisError as error:
            raise errors.BrokerError(f"the state store does not answer: {error}") from error
        return [next(fetched) if meta is None else read_state(meta) for meta in carried]

    def infer(self, model: str, inputs: Inputs, *, timeout_s: float | None = None, **options: Any) -> InferenceResult:
        """`submit` and `result` in one call. The reply is listened for before the request is sent."""
        [request] = self._build_all([{"model": model, "inputs": inputs, **options}])
        arrived: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
        stop_watching = self.watch([request.id], arrived.put)
        try:
            [accepted] = self._send([request])
            if accepted != request.id:  # an idempotency key that was used before
                return self.result(accepted, timeout_s)
            return _result_of(self._arriving(arrived, {accepted: None}, timeout_s, time.monotonic()))
        finally:
            stop_watching()

    def cancel(self, request_id: str) -> bool:
        """Cancel a request that is not finished: it ends as REVOKED, and no later result replaces that.

        Returns:
            False when it had finished already.
        """
        error = errors.RequestCancelledError(f"request {request_id} was cancelled", {"request_id": request_id})
        tenant = self.store.tenant_of(request_id)
        return self.store.answer(
            [failure_answer(request_id, error, self._reply_channel, state=REVOKED, tenant=tenant)]
        )[0]


def _result_of(outcomes: Iterator[tuple[str, InferenceResult | errors.MuaiError]]) -> InferenceResult:
    _, outcome = next(outcomes)
    if isinstance(outcome, errors.MuaiError):
        raise outcome
    return outcome


def still_open(request_ids: Iterable[str], timeout_s: float | None) -> errors.ResultTimeoutError:
    """The error of a caller whose wait for these requests ran out."""
    left = list(request_ids)
    return errors.ResultTimeoutError(
        f"{len(left)} of the requests are not finished after {timeout_s} s; they go on", {"open": left}
    )


def _submitter(settings: Settings, store: Store) -> Submitter:
    max_payload_bytes = settings.queue.max_payload_mb * 1_000_000
    if settings.queue.broker_is_redis and settings.queue.broker_url == settings.queue.state_url:
        return RedisSubmitter(store, max_payload_bytes=max_payload_bytes)
    from kombu import Connection

    from muai_config import celery_settings

    conf = celery_settings(settings, "producer")
    options = {key: value for key, value in conf["broker_transport_options"].items() if key != "confirm_publish"}
    connection = Connection(conf["broker_url"], transport_options=options, connect_timeout=5)
    return KombuSubmitter(store, connection, conf["task_queues"], max_payload_bytes=max_payload_bytes)


__all__ = ["DEFAULT_PRIORITY", "InferenceClient", "Inputs", "RequestStatus"]
