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
from muai_producers.wire import Batch, InferenceRequest, InferenceResult, input_chars

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
        self.collectors = f"{prefix}:collectors"
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
# "status": no decoding of what may be a large result. Calls are made for many keys at once where Redis allows it: a
# call from a script costs more than the work that it does.
_IS_TERMINAL = """
local CHUNK = 1000
local function is_terminal(meta)
  if not meta then return false end
  local head = string.sub(meta, 12, 14)
  return head == 'SUC' or head == 'FAI' or head == 'REV'
end
local function in_chunks(list, call)
  for first = 1, #list, CHUNK do call(first, math.min(first + CHUNK - 1, #list)) end
end
local function states_of(ids)
  local metas = {}
  in_chunks(ids, function(first, last)
    local keys = {}
    for i = first, last do keys[#keys + 1] = 'celery-task-meta-' .. ids[i] end
    local found = redis.call('MGET', unpack(keys))
    for i = 1, #found do metas[first + i - 1] = found[i] end
  end)
  return metas
end
"""
_RELEASE = """
local function add(tally, name, change) tally[name] = (tally[name] or 0) + change end
local function release(inflight, load, ids)
  local tally = {}
  in_chunks(ids, function(first, last)
    for _, entry in ipairs(redis.call('HMGET', inflight, unpack(ids, first, last))) do
      if entry then
        local tenant, model, tokens = string.match(entry, '^(.-)\\t(.-)\\t(%d+)\\t')
        add(tally, 't:' .. tenant, -1)
        add(tally, 'k:' .. tenant, -tonumber(tokens))
        add(tally, 'm:' .. model, -1)
      end
    end
    redis.call('HDEL', inflight, unpack(ids, first, last))
  end)
  for name, change in pairs(tally) do
    if redis.call('HINCRBY', load, name, change) == 0 then redis.call('HDEL', load, name) end
  end
end
"""

# KEYS: inflight, load. ARGV: capacity, tenant_requests, tenant_tokens, model_requests (-1:
# unlimited), idempotency ttl_s, number of requests, '1' when messages are pushed here; then six per request: id,
# tenant, model, tokens, idempotency key ('' for none), digest; then, when pushing, two per request: list, payload.
# A call that was made before, and whose answer got lost, changes nothing: requests with an idempotency key are
# recognised by it, and the others were all admitted or none, so that the first of them tells.
SUBMIT = """
local inflight, load = KEYS[1], KEYS[2]
local limits = {capacity = tonumber(ARGV[1]), t = tonumber(ARGV[2]), k = tonumber(ARGV[3]), m = tonumber(ARGV[4])}
local n, pushes, first = tonumber(ARGV[6]), ARGV[7] == '1', 8
local repeated = nil
local function is_repeated(id)
  if repeated == nil then
    repeated = redis.call('HEXISTS', inflight, id) == 1 or redis.call('EXISTS', 'celery-task-meta-' .. id) == 1
  end
  return repeated
end
local ids, fresh, tenants, tokens_of, models, keyed = {}, {}, {}, {}, {}, {}
for i = 1, n do
  local at = first + 6 * (i - 1)
  local id, tenant, model, idem = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 4]
  ids[i] = id
  local known = nil
  if idem ~= '' then
    local digest = ARGV[at + 5]
    local record = keyed[idem] or redis.call('GET', idem)
    if record then
      local known_id, known_digest = string.match(record, '^(.-)\\t(.*)$')
      if known_digest ~= digest then return {'conflict', i - 1, known_id} end
      known = known_id
      ids[i] = known_id
    else
      keyed[idem] = id .. '\\t' .. digest
    end
  end
  if not known and (idem ~= '' or not is_repeated(id)) then
    fresh[#fresh + 1] = i
    tenants[tenant] = (tenants[tenant] or 0) + 1
    tokens_of[tenant] = (tokens_of[tenant] or 0) + tonumber(ARGV[at + 3])
    models[model] = (models[model] or 0) + 1
  end
end
if #fresh == 0 then return {'ok', ids} end
local in_flight = redis.call('HLEN', inflight)
if limits.capacity >= 0 and in_flight + #fresh > limits.capacity then
  return {'full', 'queue_capacity', '', limits.capacity, in_flight}
end
local function refusal(kind, name, tally)
  if limits[kind] < 0 then return nil end
  for of, more in pairs(tally) do
    local used = tonumber(redis.call('HGET', load, kind .. ':' .. of) or '0')
    if used + more > limits[kind] then return {'full', name, of, limits[kind], used} end
  end
end
local refused = refusal('t', 'tenant_max_requests', tenants) or refusal('k', 'tenant_max_tokens', tokens_of)
  or refusal('m', 'model_max_requests', models)
if refused then return refused end
local now, entries, lists = redis.call('TIME')[1], {}, {}
for _, i in ipairs(fresh) do
  local at = first + 6 * (i - 1)
  entries[#entries + 1] = ARGV[at]
  entries[#entries + 1] = table.concat({ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], now}, '\\t')
  if pushes then
    local push = first + 6 * n + 2 * (i - 1)
    local payloads = lists[ARGV[push]]
    if payloads then payloads[#payloads + 1] = ARGV[push + 1] else lists[ARGV[push]] = {ARGV[push + 1]} end
  end
end
redis.call('HSET', inflight, unpack(entries))
for list, payloads in pairs(lists) do redis.call('LPUSH', list, unpack(payloads)) end
for tenant, more in pairs(tenants) do redis.call('HINCRBY', load, 't:' .. tenant, more) end
for tenant, more in pairs(tokens_of) do redis.call('HINCRBY', load, 'k:' .. tenant, more) end
for model, more in pairs(models) do redis.call('HINCRBY', load, 'm:' .. model, more) end
for idem, record in pairs(keyed) do redis.call('SET', idem, record, 'EX', ARGV[5]) end
return {'ok', ids}
"""

# KEYS: inflight, load, stats. ARGV: ttl_s, then three per request: id, encoded meta, reply channel ('' for none).
# Whoever waits for one request with Celery's AsyncResult is subscribed to its key; nobody else is told of it.
ANSWER = (
    _IS_TERMINAL
    + _RELEASE
    + """
local ttl, ids, keys = ARGV[1], {}, {}
for i = 2, #ARGV, 3 do
  ids[#ids + 1] = ARGV[i]
  keys[#keys + 1] = 'celery-task-meta-' .. ARGV[i]
end
local metas, written, done, refused, by_channel = states_of(ids), {}, {}, 0, {}
local seen = {}
for i, id in ipairs(ids) do
  if seen[id] or is_terminal(metas[i]) then
    refused = refused + 1
    written[i] = 0
  else
    seen[id] = true
    written[i] = 1
    done[#done + 1] = id
    redis.call('SET', keys[i], ARGV[3 * i], 'EX', ttl)
    local channel = ARGV[3 * i + 1]
    if channel ~= '' then
      local told = by_channel[channel]
      if told then told[#told + 1] = id else by_channel[channel] = {id} end
    end
  end
end
release(KEYS[1], KEYS[2], done)
in_chunks(keys, function(first, last)
  local counts = redis.call('PUBSUB', 'NUMSUB', unpack(keys, first, last))
  for i = 2, #counts, 2 do
    local at = first + i / 2 - 1
    if counts[i] > 0 and written[at] == 1 then redis.call('PUBLISH', keys[at], ARGV[3 * at]) end
  end
end)
for channel, told in pairs(by_channel) do redis.call('PUBLISH', channel, table.concat(told, '\\n')) end
if refused > 0 then redis.call('HINCRBY', KEYS[3], 'duplicates_refused', refused) end
redis.call('HINCRBY', KEYS[3], 'answered', #done)
return written
"""
)

# KEYS: none. ARGV: ttl_s, encoded state without the task id ('' to look only), then the ids. Returns 1 per id that was
# not terminal.
MARK = (
    _IS_TERMINAL
    + """
local ids = {}
for i = 3, #ARGV do ids[#ids + 1] = ARGV[i] end
local open = {}
for i, meta in ipairs(states_of(ids)) do
  open[i] = is_terminal(meta) and 0 or 1
  if open[i] == 1 and ARGV[2] ~= '' then
    redis.call('SET', 'celery-task-meta-' .. ids[i], ARGV[2] .. ',"task_id":"' .. ids[i] .. '"}', 'EX', ARGV[1])
  end
end
return open
"""
)

# KEYS: inflight, load. ARGV: ids. Undoes an admission whose message could not be published.
RELEASE = (
    _IS_TERMINAL
    + _RELEASE
    + """
release(KEYS[1], KEYS[2], ARGV)
return #ARGV
"""
)

# KEYS: outstanding of the engine, runs, fleet channel. ARGV: batch id, engine, now_s, seconds that it took, its
# size, its model, then two per batch that goes on elsewhere: outstanding key, id.
FINISH = """
for i = 7, #ARGV, 2 do redis.call('ZADD', ARGV[i], ARGV[3], ARGV[i + 1]) end
redis.call('HDEL', KEYS[2], ARGV[1])
redis.call('ZREM', KEYS[1], ARGV[1])
local left = redis.call('ZCARD', KEYS[1])
redis.call('PUBLISH', KEYS[3], table.concat({'done', ARGV[2], left, ARGV[4], ARGV[5], ARGV[6]}, '\\t'))
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

    def start_batch(
        self, batch_id: str, request_ids: Sequence[str], info: dict[str, Any] | None
    ) -> tuple[list[bool], int]:
        """Mark the requests of a batch STARTED, unless `info` is None, and count the start.

        Returns:
            for each request whether it is still to be answered, and how often the batch has been started and not
            finished, this time included.
        """
        pipe = self.client.pipeline(transaction=False)
        # EVAL, not a registered script: redis-py spends a round trip on asking whether a pipeline's scripts are there.
        args = [0, "", *request_ids] if info is None else self._mark_args(STARTED, request_ids, info)
        pipe.eval(MARK, 0, *args)
        pipe.hincrby(self.keys.runs, batch_id, 1)
        flags, num_starts = pipe.execute()
        return [bool(flag) for flag in flags], int(num_starts)

    def finish_batch(
        self,
        batch: Batch,
        *,
        now_s: float,
        took_s: float,
        size: int,
        moved: Iterable[tuple[str, str]] = (),
    ) -> None:
        """Free a batch's slot and tell the collectors; take a slot for each `(engine, id)` that goes on elsewhere.

        Args:
            size: requests that were run.
        """
        engine = batch.engine
        args: list[Any] = [batch.id, engine, now_s, round(took_s, 6), size, batch.model]
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
