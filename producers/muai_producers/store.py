"""The state store: where requests stand, their results, and how many are in flight. Always Redis.

Results lie where Celery's own Redis backend keeps them (`celery-task-meta-<id>`), in its format, so that
`AsyncResult(id)` works for every request. What is ours is that a terminal state is written once: every writer goes
through the scripts below, and a script that finds `SUCCESS`, `FAILURE` or `REVOKED` leaves it as it is.

The capacity in use is a hash of the ids in flight, not a counter: releasing an id twice, or one that was never
admitted, changes nothing, so the count cannot drift. Counters by model and tenant move only together with an entry
of that hash.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import msgspec

from muai_producers.errors import MuaiError
from muai_producers.wire import InferenceRequest, InferenceResult, input_chars

META_PREFIX = "celery-task-meta-"
PENDING, RECEIVED, BATCHED, STARTED, RETRY = "PENDING", "RECEIVED", "BATCHED", "STARTED", "RETRY"
SUCCESS, FAILURE, REVOKED = "SUCCESS", "FAILURE", "REVOKED"
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
        self.circuits = f"{prefix}:circuits"
        self.dead = f"{prefix}:dead"

    def outstanding(self, engine: str) -> str:
        """Set of the batches that are on the engine's queue or running."""
        return f"{self.prefix}:outstanding:{engine}"

    def idempotency(self, tenant: str, key: str) -> str:
        """Where an idempotency key's request id and content digest are kept."""
        return f"{self.prefix}:idem:{tenant}:{key}"

    def reply_channel(self, client_id: str) -> str:
        """Channel on which a client hears which of its requests have finished."""
        return f"{self.prefix}:reply:{client_id}"


# A terminal state is recognised by the first bytes of the stored JSON, which every writer of ours begins with
# "status": no decoding of what may be a large result.
_IS_TERMINAL = """
local function is_terminal(key)
  local head = redis.call('GETRANGE', key, 0, 12)
  return head == '{"status":"SU' or head == '{"status":"FA' or head == '{"status":"RE' and
    redis.call('GETRANGE', key, 11, 17) == 'REVOKED'
end
local function release(inflight, load, id, delta)
  local entry = redis.call('HGET', inflight, id)
  if not entry then return end
  redis.call('HDEL', inflight, id)
  local tenant, model, tokens = string.match(entry, '^(.-)\\t(.-)\\t(%d+)\\t')
  delta['t:' .. tenant] = (delta['t:' .. tenant] or 0) - 1
  delta['k:' .. tenant] = (delta['k:' .. tenant] or 0) - tonumber(tokens)
  delta['m:' .. model] = (delta['m:' .. model] or 0) - 1
end
local function apply(load, delta)
  for name, change in pairs(delta) do
    if redis.call('HINCRBY', load, name, change) == 0 then redis.call('HDEL', load, name) end
  end
end
"""

# KEYS: inflight, load. ARGV: capacity, tenant_requests, tenant_tokens, model_requests (-1: unlimited), idem_ttl_s,
# then six per request: id, tenant, model, tokens, idempotency key ('' for none), digest; then, when messages are
# pushed here, two per request: list, payload.
SUBMIT = (
    _IS_TERMINAL
    + """
local inflight, load = KEYS[1], KEYS[2]
local capacity, tenant_requests, tenant_tokens, model_requests =
  tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local now = redis.call('TIME')[1]
local n, pushes = tonumber(ARGV[6]), ARGV[7] == '1'
local first, first_push = 8, 8 + 6 * tonumber(ARGV[6])
local fresh, answers, delta = 0, {}, {}
local function over(limit, name, more)
  return limit >= 0 and tonumber(redis.call('HGET', load, name) or '0') + more > limit
end
for i = 0, n - 1 do
  local at = first + 6 * i
  local id, tenant, model, tokens, idem, digest =
    ARGV[at], ARGV[at + 1], ARGV[at + 2], tonumber(ARGV[at + 3]), ARGV[at + 4], ARGV[at + 5]
  answers[i + 1] = id
  local known = idem ~= '' and redis.call('GET', idem)
  if known then
    local known_id, known_digest = string.match(known, '^(.-)\\t(.*)$')
    if known_digest ~= digest then return {'conflict', i, known_id} end
    answers[i + 1] = known_id
    ARGV[at] = ''
  elseif idem ~= '' and delta['i:' .. idem] then
    if delta['i:' .. idem][2] ~= digest then return {'conflict', i, delta['i:' .. idem][1]} end
    answers[i + 1] = delta['i:' .. idem][1]
    ARGV[at] = ''
  elseif redis.call('HEXISTS', inflight, id) == 1 or redis.call('EXISTS', 'celery-task-meta-' .. id) == 1 then
    ARGV[at] = ''  -- this very call has been here before: its answer was lost and the client asked again
  else
    fresh = fresh + 1
    if idem ~= '' then delta['i:' .. idem] = {id, digest} end
    delta['t:' .. tenant] = (delta['t:' .. tenant] or 0) + 1
    delta['k:' .. tenant] = (delta['k:' .. tenant] or 0) + tokens
    delta['m:' .. model] = (delta['m:' .. model] or 0) + 1
  end
end
if capacity >= 0 and redis.call('HLEN', inflight) + fresh > capacity then
  return {'full', 'queue_capacity', '', capacity, redis.call('HLEN', inflight)}
end
for name, more in pairs(delta) do
  local kind, of = string.sub(name, 1, 2), string.sub(name, 3)
  if kind == 't:' and over(tenant_requests, name, more) then
    return {'full', 'tenant_max_requests', of, tenant_requests, redis.call('HGET', load, name) or '0'}
  elseif kind == 'k:' and over(tenant_tokens, name, more) then
    return {'full', 'tenant_max_tokens', of, tenant_tokens, redis.call('HGET', load, name) or '0'}
  elseif kind == 'm:' and over(model_requests, name, more) then
    return {'full', 'model_max_requests', of, model_requests, redis.call('HGET', load, name) or '0'}
  end
end
for i = 0, n - 1 do
  local at = first + 6 * i
  local id = ARGV[at]
  if id ~= '' then
    redis.call('HSET', inflight, id, ARGV[at + 1] .. '\\t' .. ARGV[at + 2] .. '\\t' .. ARGV[at + 3] .. '\\t' .. now)
    if ARGV[at + 4] ~= '' then
      redis.call('SET', ARGV[at + 4], id .. '\\t' .. ARGV[at + 5], 'EX', ARGV[5])
    end
    if pushes then redis.call('LPUSH', ARGV[first_push + 2 * i], ARGV[first_push + 2 * i + 1]) end
  end
end
for name, more in pairs(delta) do
  if string.sub(name, 1, 2) ~= 'i:' then redis.call('HINCRBY', load, name, more) end
end
return {'ok', answers}
"""
)

# KEYS: inflight, load, stats. ARGV: ttl_s, then three per request: id, encoded meta, reply channel ('' for none).
ANSWER = (
    _IS_TERMINAL
    + """
local ttl, written, delta, refused = ARGV[1], {}, {}, 0
local by_channel = {}
for i = 2, #ARGV, 3 do
  local id, meta, channel = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local key = 'celery-task-meta-' .. id
  if is_terminal(key) then
    refused = refused + 1
    written[#written + 1] = 0
  else
    redis.call('SET', key, meta, 'EX', ttl)
    redis.call('PUBLISH', key, meta)
    release(KEYS[1], KEYS[2], id, delta)
    if channel ~= '' then
      local ids = by_channel[channel]
      if ids then ids[#ids + 1] = id else by_channel[channel] = {id} end
    end
    written[#written + 1] = 1
  end
end
apply(KEYS[2], delta)
for channel, ids in pairs(by_channel) do redis.call('PUBLISH', channel, table.concat(ids, '\\n')) end
if refused > 0 then redis.call('HINCRBY', KEYS[3], 'duplicates_refused', refused) end
return written
"""
)

# KEYS: none. ARGV: ttl_s, encoded state without the task id, then the ids. Returns 1 per id that was not terminal.
MARK = (
    _IS_TERMINAL
    + """
local open = {}
for i = 3, #ARGV do
  local key = 'celery-task-meta-' .. ARGV[i]
  if is_terminal(key) then
    open[#open + 1] = 0
  else
    redis.call('SET', key, ARGV[2] .. ',"task_id":"' .. ARGV[i] .. '"}', 'EX', ARGV[1])
    open[#open + 1] = 1
  end
end
return open
"""
)

# KEYS: inflight, load. ARGV: ids. Undoes an admission whose message could not be published.
RELEASE = (
    _IS_TERMINAL
    + """
local delta = {}
for i = 1, #ARGV do release(KEYS[1], KEYS[2], ARGV[i], delta) end
apply(KEYS[2], delta)
return #ARGV
"""
)


# KEYS: outstanding of the engine, runs, fleet channel. ARGV: batch id, engine, now_s, then two per batch that goes on
# elsewhere: outstanding key, id.
FINISH = """
for i = 4, #ARGV, 2 do redis.call('ZADD', ARGV[i], ARGV[3], ARGV[i + 1]) end
redis.call('HDEL', KEYS[2], ARGV[1])
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('PUBLISH', KEYS[3], 'done\\t' .. ARGV[2] .. '\\t' .. redis.call('ZCARD', KEYS[1]))
"""


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
class Answer:
    """A terminal state, ready to be written."""

    request_id: str
    meta: bytes
    reply_to: str


def _now_iso() -> str:
    return datetime.now(UTC).isoformat()


def estimate_tokens(request: InferenceRequest) -> int:
    """Tokens that a request will take, judged from its length: 4 characters each, plus what it may generate."""
    generated = request.parameters.max_tokens or 0
    return max(1, (input_chars(request.inputs) + 3) // 4) + generated


def success_answer(request: InferenceRequest, result: InferenceResult) -> Answer:
    """SUCCESS with the result."""
    return _terminal(SUCCESS, msgspec.to_builtins(result), request.id, request.reply_to)


def failure_answer(request_id: str, error: MuaiError, reply_to: str | None = None, *, state: str = FAILURE) -> Answer:
    """FAILURE (or REVOKED) with an error that Celery rebuilds as the same class on the other side."""
    value = {
        "exc_type": type(error).__name__,
        "exc_message": [error.message, error.details],
        "exc_module": type(error).__module__,
        "code": error.code,
    }
    return _terminal(state, value, request_id, reply_to)


def _terminal(state: str, result: Any, request_id: str, reply_to: str | None) -> Answer:
    meta = {
        "status": state,
        "result": result,
        "traceback": None,
        "children": [],
        "date_done": _now_iso(),
        "task_id": request_id,
    }
    return Answer(request_id, msgspec.json.encode(meta), reply_to or "")


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
        self._submit = client.register_script(SUBMIT)
        self._answer = client.register_script(ANSWER)
        self._mark = client.register_script(MARK)
        self._release = client.register_script(RELEASE)
        self._finish = client.register_script(FINISH)

    def admit(
        self, requests: Sequence[InferenceRequest], limits: Limits, digests: Sequence[str], pushes: Sequence[Any] = ()
    ) -> list[Any]:
        """Admit all of the requests or none; with `pushes`, enqueue them in the same atomic step.

        Args:
            digests: content digest of each request that has an idempotency key, else ''.
            pushes: list name and payload, flat, two per request; empty when another broker carries the messages.
        Returns:
            the script's answer: `[b"ok", ids]` (an id of an earlier request where the idempotency key is known),
            `[b"full", limit, of, allowed, in_use]` or `[b"conflict", index, known_id]`.
        """
        args: list[Any] = [*limits.as_args(), self.result_ttl_s, len(requests), "1" if pushes else "0"]
        for request, digest in zip(requests, digests, strict=True):
            key = request.idempotency_key
            idem = self.keys.idempotency(request.tenant, key) if key else ""
            args += (request.id, request.tenant, request.model, estimate_tokens(request), idem, digest)
        args += pushes
        reply: list[Any] = self._submit(keys=[self.keys.inflight, self.keys.load], args=args)
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
        written = self._answer(keys=[self.keys.inflight, self.keys.load, self.keys.stats], args=args, client=pipeline)
        return [] if pipeline is not None else [bool(flag) for flag in written]

    def mark(self, state: str, request_ids: Sequence[str], info: dict[str, Any] | None = None) -> list[bool]:
        """Set a passing state; False for each request that is terminal already and so was left alone."""
        if not request_ids:
            return []
        flags = self._mark(keys=[], args=self._mark_args(state, request_ids, info))
        return [bool(flag) for flag in flags]

    def _mark_args(self, state: str, request_ids: Sequence[str], info: dict[str, Any] | None) -> list[Any]:
        meta: dict[str, Any] = {
            "status": state,
            "result": info or {},
            "traceback": None,
            "children": [],
            "date_done": None,
        }
        return [self.result_ttl_s, msgspec.json.encode(meta)[:-1], *request_ids]

    def start_batch(self, batch_id: str, request_ids: Sequence[str], info: dict[str, Any]) -> tuple[list[bool], int]:
        """Mark the requests of a batch STARTED, and count the start.

        Returns:
            for each request whether it is still to be answered, and how often the batch has been started and not
            finished, this time included.
        """
        pipe = self.client.pipeline(transaction=False)
        # EVAL, not a registered script: redis-py asks in a round trip of its own whether a pipeline's scripts are there.
        pipe.eval(MARK, 0, *self._mark_args(STARTED, request_ids, info))
        pipe.hincrby(self.keys.runs, batch_id, 1)
        flags, num_starts = pipe.execute()
        return [bool(flag) for flag in flags], int(num_starts)

    def finish_batch(self, batch_id: str, engine: str, now_s: float, moved: Iterable[tuple[str, str]] = ()) -> None:
        """Free a batch's slot and tell the collectors; take a slot for each `(engine, id)` that goes on elsewhere."""
        args: list[Any] = [batch_id, engine, now_s]
        for other_engine, moved_id in moved:
            args += (self.keys.outstanding(other_engine), moved_id)
        self._finish(keys=[self.keys.outstanding(engine), self.keys.runs, self.keys.fleet_channel], args=args)

    def fetch(self, request_ids: Sequence[str]) -> list[dict[str, Any] | None]:
        """The stored state of each request, None where nothing is known."""
        raw = self.client.mget([META_PREFIX + request_id for request_id in request_ids]) if request_ids else []
        return [None if item is None else msgspec.json.decode(item) for item in raw]

    def in_flight(self) -> int:
        """Requests accepted and not yet answered."""
        return int(self.client.pipeline(transaction=False).hlen(self.keys.inflight).execute()[0])
