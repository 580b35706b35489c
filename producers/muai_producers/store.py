"""The state store: where requests stand, their results, and how many are in flight. Always Redis.

Results lie where Celery's own Redis backend keeps them (`celery-task-meta-<id>`), in its format, so that
`AsyncResult(id)` works for every request. What is ours is that a terminal state is written once: every writer goes
through the scripts in `store_scripts`, and a script that finds `SUCCESS`, `FAILURE` or `REVOKED` leaves it as it is.

The capacity in use is a hash of the ids in flight, not a counter: releasing an id twice, or one that was never
admitted, changes nothing, so the count cannot drift. Counters by model and tenant move only together with an entry
of that hash.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import msgspec

from muai_producers.errors import MuaiError, error_from_wire
from muai_producers.store_scripts import ADMIT, ADMIT_ONCE, ANSWER, FINISH, MARK, RELEASE
from muai_producers.token_estimates import request_tokens
from muai_producers.vectors import unpack_embedding
from muai_producers.wire import Batch, InferenceRequest, InferenceResult

META_PREFIX = "celery-task-meta-"
PENDING, RECEIVED, BATCHED, STARTED, RETRY = "PENDING", "RECEIVED", "BATCHED", "STARTED", "RETRY"
SUCCESS, FAILURE, REVOKED = "SUCCESS", "FAILURE", "REVOKED"
Pushes = Mapping[str, Sequence[bytes]]
"""Messages by the list that they are pushed to."""
TERMINAL = frozenset({SUCCESS, FAILURE, REVOKED})


class RedisCommands(Protocol):
    """The part of a synchronous Redis client that the store calls."""

    def register_script(self, script: str) -> Any:
        """As `redis.Redis.register_script`."""
        ...

    def mget(self, keys: Any) -> Any:
        """As `redis.Redis.mget`."""
        ...

    def pipeline(self, transaction: bool = ...) -> Any:
        """As `redis.Redis.pipeline`."""
        ...


class StoreKeys:
    """Names of everything that the store keeps, under one prefix."""

    def __init__(self, prefix: str = "muai") -> None:
        self.prefix = prefix
        self.inflight = f"{prefix}:inflight"
        self.load = f"{prefix}:load"
        self.stats = f"{prefix}:stats"
        self.runs = f"{prefix}:runs"
        self.fleet_channel = f"{prefix}:fleet"
        self.workers = f"{prefix}:workers"
        self.own_queues = f"{prefix}:own_queues"
        """Hash of the workers' own queues, with the engine of each."""
        self.collectors = f"{prefix}:collectors"
        self.gpus = f"{prefix}:gpus"
        self.circuits = f"{prefix}:circuits"
        self.dead = f"{prefix}:dead"
        self.recent = f"{prefix}:recent"
        """List of the last that were answered; with a colon and a tenant's name, of that tenant alone."""
        self.webhooks = f"{prefix}:webhooks"
        self.webhooks_due = f"{prefix}:webhooks:due"
        self.revoked_channel = f"{prefix}:revoked"
        """Where workers hear which requests were cancelled."""

    def outstanding(self, engine: str) -> str:
        """Set of the batches that are on the engine's queues or running; for the name of a worker's own queue, of those
        that were sent to that one.
        """
        return f"{self.prefix}:outstanding:{engine}"

    def turns(self, conversation: str) -> str:
        """Sorted set of a conversation's turns that have not ended, in their order."""
        return f"{self.prefix}:turns:{conversation}"

    def conversation_pin(self, conversation: str) -> str:
        """The own queue of the worker that keeps a conversation's keys and values."""
        return f"{self.prefix}:pin:{conversation}"

    def idempotency(self, tenant: str, key: str) -> str:
        """Where an idempotency key's request id and content digest are kept."""
        return f"{self.prefix}:idem:{tenant}:{key}"

    def stream(self, request_id: str) -> str:
        """A request's text as it comes, and the channel on which readers hear that there is more."""
        return f"{self.prefix}:stream:{request_id}"

    def reply_channel(self, client_id: str) -> str:
        """Channel on which a client hears which of its requests have finished."""
        return f"{self.prefix}:reply:{client_id}"


@dataclass(frozen=True)
class Limits:
    """What may be in flight at once: accepted and not yet answered. None is unlimited."""

    queue_capacity: int | None = None
    tenant_max_requests: int | None = None
    tenant_max_tokens: int | None = None
    model_max_requests: int | None = None

    def as_args(self) -> list[int]:
        """In the order of the submit script; -1 for unlimited."""
        limits = (self.queue_capacity, self.tenant_max_requests, self.tenant_max_tokens, self.model_max_requests)
        return [-1 if limit is None else limit for limit in limits]


@dataclass(frozen=True)
class Pins:
    """Conversations that a worker keeps."""

    queue: str
    """The worker's own."""
    conversations: Sequence[str]
    ttl_s: float


class StoredState(msgspec.Struct, gc=False):
    """A stored state, its result not decoded yet."""

    status: str
    result: msgspec.Raw = msgspec.Raw(b"null")
    tenant: str = ""
    """Whose request it is; '' where the state does not say: that of a request in flight does not."""


_STATE = msgspec.json.Decoder(StoredState)
_RESULT = msgspec.json.Decoder(InferenceResult)


class _Meta(msgspec.Struct, gc=False):
    """A state as Celery's Redis backend keeps it. `status` must stay the first field: see `store_scripts`."""

    status: str
    result: Any
    task_id: str
    date_done: str
    traceback: None = None
    children: tuple[()] = ()
    tenant: str = ""
    """Ours, not Celery's, which passes over it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A terminal state, ready to be written."""

    request_id: str
    meta: bytes
    reply_to: str


def _now_iso() -> str:
    return datetime.now(UTC).isoformat()


def _counters(request: InferenceRequest, tokens: int) -> tuple[tuple[str, int], tuple[str, int], tuple[str, int]]:
    """What a request adds to: its tenant's requests and tokens, its model's requests."""
    return (f"t:{request.tenant}", 1), (f"k:{request.tenant}", tokens), (f"m:{request.model}", 1)


def _entry(request: InferenceRequest, tokens: int, now_s: int) -> str:
    """A request's record while it is in flight; the script that releases it reads it."""
    entry = f"{request.tenant}\t{request.model}\t{tokens}\t{now_s}"
    return entry if request.webhook is None else f"{entry}\t{request.webhook}"


def read_entry(entry: bytes) -> tuple[str, float]:
    """Tenant of a request in flight, and when it was admitted, in wall-clock seconds."""
    tenant, _, _, admitted_s, *_ = entry.decode().split("\t")
    return tenant, float(admitted_s)


def success_answer(request: InferenceRequest, result: InferenceResult) -> Answer:
    """SUCCESS with the result."""
    return _terminal(SUCCESS, result, request.id, request.reply_to, request.tenant)


def failure_answer(
    request_id: str, error: MuaiError, reply_to: str | None = None, *, state: str = FAILURE, tenant: str = ""
) -> Answer:
    """FAILURE (or REVOKED) with an error that Celery rebuilds as the same class on the other side.

    Args:
        tenant: whose request it is; where keys are asked for, nobody is shown a state without one.
    """
    value = {
        "exc_type": type(error).__name__,
        "exc_message": [error.message, error.details],
        "exc_module": type(error).__module__,
        "code": error.code,
    }
    return _terminal(state, value, request_id, reply_to, tenant)


def _terminal(state: str, result: Any, request_id: str, reply_to: str | None, tenant: str) -> Answer:
    meta = _Meta(status=state, result=result, task_id=request_id, date_done=_now_iso(), tenant=tenant)
    return Answer(request_id, msgspec.json.encode(meta), reply_to or "")


def read_state(meta: bytes) -> StoredState:
    """A state as it is stored."""
    return _STATE.decode(meta)


def outcome_of(state: StoredState) -> InferenceResult | MuaiError:
    """The result or error of a terminal state; an embedding is always numbers."""
    if state.status == SUCCESS:
        result = _RESULT.decode(state.result)
        unpack_embedding(result.outputs)
        return result
    failure = msgspec.json.decode(state.result) or {}
    message, details = [*failure.get("exc_message", []), "", {}][:2]
    return error_from_wire({"type": failure.get("exc_type"), "message": message, "details": details})


class Store:
    """The state store's operations, each one round trip for any number of requests.

    Args:
        client: a synchronous Redis client that returns bytes.
        result_ttl_s: how long states and results are kept.
    Raises:
        redis.exceptions.RedisError: from every method, when the store does not answer.
    """

    def __init__(self, client: RedisCommands, *, prefix: str = "muai", result_ttl_s: int = 86_400) -> None:
        self.client = client
        self.keys = StoreKeys(prefix)
        self.result_ttl_s = result_ttl_s
        self._admit = client.register_script(ADMIT)
        self._admit_once = client.register_script(ADMIT_ONCE)
        self._answer = client.register_script(ANSWER)
        self._mark = client.register_script(MARK)
        self._release = client.register_script(RELEASE)
        self._finish = client.register_script(FINISH)

    def admit(self, requests: Sequence[InferenceRequest], limits: Limits, pushes: Pushes | None = None) -> list[Any]:
        """Admit all of the requests or none; with `pushes`, enqueue them in the same atomic step.

        None of the requests has an idempotency key: those go to `admit_once`.

        Args:
            pushes: messages by list; None when another broker carries them.
        Returns:
            the script's answer: `[b"ok"]` or `[b"full", limit, of, allowed, in_use]`.
        """
        now_s = int(time.time())
        tally: dict[str, int] = {}
        entries: list[str] = []
        for request in requests:
            tokens = request_tokens(request)
            for counter, more in _counters(request, tokens):
                tally[counter] = tally.get(counter, 0) + more
            entries += (request.id, _entry(request, tokens, now_s))
        args: list[Any] = [*limits.as_args(), len(requests), len(tally), len(pushes or ())]
        for counter, more in tally.items():
            args += (counter, more)
        args += entries
        for name, messages in (pushes or {}).items():
            args += (name, len(messages), *messages)
        reply: list[Any] = self._admit(keys=[self.keys.inflight, self.keys.load], args=args)
        return reply

    def admit_once(
        self, request: InferenceRequest, limits: Limits, digest: str, push: tuple[str, bytes] | None = None
    ) -> list[Any]:
        """Admit a request with an idempotency key, unless its key is known.

        Args:
            digest: of what makes two requests with one key the same.
            push: list and message, as in `admit`.
        Returns:
            `[b"ok", id]` with the id of the first request of that key, `[b"conflict", id]` when that one had other
            content, or `[b"full", …]` as `admit`.
        """
        tokens = request_tokens(request)
        tenant, tenant_tokens, model = (counter for counter, _ in _counters(request, tokens))
        entry = _entry(request, tokens, int(time.time()))
        args: list[Any] = [*limits.as_args(), self.result_ttl_s, request.id, digest, entry]
        args += (tenant, tenant_tokens, tokens, model, *(push or ()))
        record = self.keys.idempotency(request.tenant, request.idempotency_key or "")
        reply: list[Any] = self._admit_once(keys=[self.keys.inflight, self.keys.load, record], args=args)
        return reply

    def release(self, request_ids: Iterable[str]) -> None:
        """Give back the capacity of requests whose messages were never published."""
        self._release(keys=[self.keys.inflight, self.keys.load], args=list(request_ids))

    def answer(self, answers: Sequence[Answer], pipeline: Any = None) -> list[bool]:
        """Write terminal states; True for each that was written, False for each that had one already."""
        if not answers:
            return []
        args: list[Any] = [self.result_ttl_s]
        for answer in answers:
            args += (answer.request_id, answer.meta, answer.reply_to)
        keys = self.keys
        names = [keys.inflight, keys.load, keys.stats, keys.revoked_channel]
        names += [keys.webhooks, keys.webhooks_due, keys.recent]
        written = self._answer(keys=names, args=args, client=pipeline)
        return [] if pipeline is not None else [bool(flag) for flag in written]

    def mark(
        self, state: str, request_ids: Sequence[str], info: dict[str, Any] | None = None, *, tenant: str = ""
    ) -> list[bool]:
        """Set a passing state; False for each request that is terminal already and so was left alone.

        Args:
            tenant: whose they are, for what is not admitted as requests are.
        """
        if not request_ids:
            return []
        flags = self._mark(keys=[], args=self._mark_args(state, request_ids, info, tenant))
        return [bool(flag) for flag in flags]

    def _mark_args(
        self, state: str, request_ids: Sequence[str], info: dict[str, Any] | None, tenant: str = ""
    ) -> list[Any]:
        meta: dict[str, Any] = {
            "status": state,
            "result": info or {},
            "traceback": None,
            "children": [],
            "date_done": None,
            **({"tenant": tenant} if tenant else {}),
        }
        return [self.result_ttl_s, msgspec.json.encode(meta)[:-1], *request_ids]

    def start_batch(
        self, batch_id: str, request_ids: Sequence[str], info: dict[str, Any] | None, pins: Pins | None = None
    ) -> tuple[list[bool], int]:
        """Mark the requests of a batch STARTED, unless `info` is None, and count the start.

        Args:
            pins: the conversations among them whose keys and values the worker will keep.
        Returns:
            for each request whether it is still to be answered, and how often the batch has been started and not
            finished, this time included.
        """
        pipe = self.client.pipeline(transaction=False)
        # EVAL, not a registered script: redis-py spends a round trip on asking whether a pipeline's scripts are there.
        args = [0, "", *request_ids] if info is None else self._mark_args(STARTED, request_ids, info)
        pipe.eval(MARK, 0, *args)
        pipe.hincrby(self.keys.runs, batch_id, 1)
        for conversation in () if pins is None else pins.conversations:
            assert pins is not None
            pipe.set(self.keys.conversation_pin(conversation), pins.queue, px=int(pins.ttl_s * 1000))
        flags, num_starts, *_ = pipe.execute()
        return [bool(flag) for flag in flags], int(num_starts)

    def finish_batch(
        self,
        batch: Batch,
        *,
        now_s: float,
        took_s: float,
        size: int,
        moved: Sequence[tuple[str, str]] = (),
        ended: Iterable[tuple[str, str]] = (),
    ) -> None:
        """Free a batch's slot and tell the collectors; take a slot for each `(engine, id)` that goes on elsewhere.

        Args:
            size: requests that were run.
            ended: conversations of which a turn has ended, each with that turn's id.
        """
        engine, keys = batch.engine, self.keys
        args: list[Any] = [batch.id, engine, now_s, round(took_s, 6), size, batch.model, batch.queue, len(moved)]
        for other_engine, moved_id in moved:
            args += (keys.outstanding(other_engine), moved_id)
        for conversation, request_id in ended:
            args += (keys.turns(conversation), request_id, conversation)
        names = [keys.outstanding(engine), keys.runs, keys.fleet_channel, keys.outstanding(batch.queue)]
        self._finish(keys=names, args=args)

    def states(self, request_ids: Sequence[str]) -> list[StoredState | None]:
        """As `fetch`, with the results left undecoded."""
        raw = self.client.mget([META_PREFIX + request_id for request_id in request_ids]) if request_ids else []
        return [None if item is None else _STATE.decode(item) for item in raw]

    def fetch(self, request_ids: Sequence[str]) -> list[dict[str, Any] | None]:
        """The stored state of each request, None where nothing is known."""
        raw = self.client.mget([META_PREFIX + request_id for request_id in request_ids]) if request_ids else []
        return [None if item is None else msgspec.json.decode(item) for item in raw]

    def tenant_of(self, request_id: str) -> str:
        """Whose request this is, in flight or not; '' when nobody knows."""
        pipe = self.client.pipeline(transaction=False)
        entry, meta = pipe.hget(self.keys.inflight, request_id).get(META_PREFIX + request_id).execute()
        if entry is not None:
            return read_entry(entry)[0]
        return "" if meta is None else _STATE.decode(meta).tenant

    def progress(self) -> tuple[int, int]:
        """Requests in flight, and how many have been answered since the store began."""
        pipe = self.client.pipeline(transaction=False)
        in_flight, answered = pipe.hlen(self.keys.inflight).hget(self.keys.stats, "answered").execute()
        return int(in_flight), int(answered or 0)

    def in_flight(self) -> int:
        """Requests accepted and not yet answered."""
        return int(self.client.pipeline(transaction=False).hlen(self.keys.inflight).execute()[0])
