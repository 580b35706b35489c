"""The state store's scripts: each makes its change whole or not at all, for any number of requests at once.

`Store` calls them and says what they are for; here is what each takes. The names that they build themselves
(`celery-task-meta-…`) are Celery's, as `store.META_PREFIX`.
"""

from __future__ import annotations

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
  local tally, hooks, entries = {}, {}, {}
  in_chunks(ids, function(first, last)
    for i, entry in ipairs(redis.call('HMGET', inflight, unpack(ids, first, last))) do
      entries[first + i - 1] = entry
      if entry then
        local tenant, model, tokens, webhook = string.match(entry, '^(.-)\\t(.-)\\t(%d+)\\t%d+(.*)$')
        if webhook ~= '' then hooks[#hooks + 1] = {ids[first + i - 1], tenant .. webhook} end
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
  return hooks, entries
end
"""
# The last that were answered, of all tenants and of each, newest first, for whoever looks on: id, tenant, model, tokens
# and time of admission, with tabs between. A call that answers many adds the last of them alone.
_REMEMBER = """
local RECENT, OF_ONE_CALL = 100, 16
local function remember(recent, ids, entries, ttl)
  local lines, by_tenant = {}, {}
  for i = math.max(1, #ids - OF_ONE_CALL + 1), #ids do
    local entry = entries[i] or ''
    local tenant, rest = string.match(entry, '^([^\\t]*)(\\t[^\\t]*\\t%d+\\t%d+)')
    local line = ids[i] .. '\\t' .. (tenant and tenant .. rest or '')
    lines[#lines + 1] = line
    if tenant then
      local own = by_tenant[tenant]
      if own then own[#own + 1] = line else by_tenant[tenant] = {line} end
    end
  end
  local function push(list, of)
    if redis.call('LPUSH', list, unpack(of)) > RECENT + OF_ONE_CALL then
      redis.call('LTRIM', list, 0, RECENT - 1)
    end
  end
  if #lines > 0 then push(recent, lines) end
  for tenant, own in pairs(by_tenant) do
    push(recent .. ':' .. tenant, own)
    redis.call('EXPIRE', recent .. ':' .. tenant, ttl)
  end
end
"""

# The checks that admission makes, over `tally`: a table of counters' names and what they would grow by.
_ADMIT = """
local function refusal(inflight, load, limits, fresh, tally)
  local in_flight = redis.call('HLEN', inflight)
  if limits.capacity >= 0 and in_flight + fresh > limits.capacity then
    return {'full', 'queue_capacity', '', limits.capacity, in_flight}
  end
  local names = {t = 'tenant_max_requests', k = 'tenant_max_tokens', m = 'model_max_requests'}
  for counter, more in pairs(tally) do
    local kind = string.sub(counter, 1, 1)
    if limits[kind] >= 0 then
      local used = tonumber(redis.call('HGET', load, counter) or '0')
      if used + more > limits[kind] then
        return {'full', names[kind], string.sub(counter, 3), limits[kind], used}
      end
    end
  end
end
local function read_limits()
  return {capacity = tonumber(ARGV[1]), t = tonumber(ARGV[2]), k = tonumber(ARGV[3]), m = tonumber(ARGV[4])}
end
local function is_admitted(inflight, id)
  return redis.call('HEXISTS', inflight, id) == 1 or redis.call('EXISTS', 'celery-task-meta-' .. id) == 1
end
"""

# Admission of requests without idempotency keys: all or none, with hardly any work for each.
# KEYS: inflight, load. ARGV: capacity, tenant_requests, tenant_tokens, model_requests (-1: unlimited), number of
# requests, number of counters, number of lists; then counter and growth of each counter; then id and entry of each
# request; then, per list, its name, the number of its messages, and they.
# A call that was made before, and whose answer got lost, changes nothing: its first request tells.
ADMIT = (
    _ADMIT
    + """
local inflight, load = KEYS[1], KEYS[2]
local n, at, tally = tonumber(ARGV[5]), 8, {}
for _ = 1, tonumber(ARGV[6]) do
  tally[ARGV[at]] = tonumber(ARGV[at + 1])
  at = at + 2
end
if is_admitted(inflight, ARGV[at]) then return {'ok'} end
local refused = refusal(inflight, load, read_limits(), n, tally)
if refused then return refused end
redis.call('HSET', inflight, unpack(ARGV, at, at + 2 * n - 1))
at = at + 2 * n
for _ = 1, tonumber(ARGV[7]) do
  local count = tonumber(ARGV[at + 1])
  redis.call('LPUSH', ARGV[at], unpack(ARGV, at + 2, at + 1 + count))
  at = at + 2 + count
end
for counter, more in pairs(tally) do redis.call('HINCRBY', load, counter, more) end
return {'ok'}
"""
)

# Admission of one request with an idempotency key. KEYS: inflight, load, the key's record. ARGV: the four limits,
# ttl_s, id, content digest, entry, tenant counter, tokens counter, tokens, model counter, then list and message where
# they are pushed here.
ADMIT_ONCE = (
    _ADMIT
    + """
local record = redis.call('GET', KEYS[3])
if record then
  local id, digest = string.match(record, '^(.-)\\t(.*)$')
  if digest ~= ARGV[7] then return {'conflict', id} end
  return {'ok', id}
end
local tally = {[ARGV[9]] = 1, [ARGV[10]] = tonumber(ARGV[11]), [ARGV[12]] = 1}
local refused = refusal(KEYS[1], KEYS[2], read_limits(), 1, tally)
if refused then return refused end
redis.call('HSET', KEYS[1], ARGV[6], ARGV[8])
for counter, more in pairs(tally) do redis.call('HINCRBY', KEYS[2], counter, more) end
redis.call('SET', KEYS[3], ARGV[6] .. '\\t' .. ARGV[7], 'EX', ARGV[5])
if ARGV[13] then redis.call('LPUSH', ARGV[13], ARGV[14]) end
return {'ok', ARGV[6]}
"""
)

CARRIED_ANSWERS = 4
CARRIED_BYTES = 2000
"""Notices carry at most this much, for Redis keeps them in memory until their reader has taken them, and cuts off one
that lets 32 MB pile up."""

# KEYS: inflight, load, stats, revoked channel, webhooks, webhooks due, recent. ARGV: ttl_s, then three per request: id,
# encoded meta, reply channel ('' for none). Whoever waits for one request with Celery's AsyncResult is subscribed to
# its key; nobody else is told of it. Workers are told of what was cancelled, for they may be running it.
# A notice has a line for each request: its id and, where few small answers are written at once, a blank and the meta,
# so that whoever waits need not fetch it.
ANSWER = (
    f"local CARRIED_ANSWERS, CARRIED_BYTES = {CARRIED_ANSWERS}, {CARRIED_BYTES}\n"
    + _IS_TERMINAL
    + _RELEASE
    + _REMEMBER
    + """
local ttl, ids, keys = ARGV[1], {}, {}
for i = 2, #ARGV, 3 do
  ids[#ids + 1] = ARGV[i]
  keys[#keys + 1] = 'celery-task-meta-' .. ARGV[i]
end
local metas, written, done, refused, by_channel, revoked = states_of(ids), {}, {}, 0, {}, {}
local seen, are_few = {}, #ids <= CARRIED_ANSWERS
for i, id in ipairs(ids) do
  if seen[id] or is_terminal(metas[i]) then
    refused = refused + 1
    written[i] = 0
  else
    seen[id] = true
    written[i] = 1
    done[#done + 1] = id
    redis.call('SET', keys[i], ARGV[3 * i], 'EX', ttl)
    if string.sub(ARGV[3 * i], 12, 14) == 'REV' then revoked[#revoked + 1] = id end
    local channel = ARGV[3 * i + 1]
    if channel ~= '' then
      local line = id
      if are_few and #ARGV[3 * i] <= CARRIED_BYTES then line = id .. ' ' .. ARGV[3 * i] end
      local told = by_channel[channel]
      if told then told[#told + 1] = line else by_channel[channel] = {line} end
    end
  end
end
local hooks, entries = release(KEYS[1], KEYS[2], done)
remember(KEYS[7], done, entries, ttl)
for _, hook in ipairs(hooks) do
  redis.call('HSET', KEYS[5], hook[1], hook[2])
  redis.call('ZADD', KEYS[6], 0, hook[1])
end
in_chunks(keys, function(first, last)
  local counts = redis.call('PUBSUB', 'NUMSUB', unpack(keys, first, last))
  for i = 2, #counts, 2 do
    local at = first + i / 2 - 1
    if counts[i] > 0 and written[at] == 1 then redis.call('PUBLISH', keys[at], ARGV[3 * at]) end
  end
end)
for channel, told in pairs(by_channel) do redis.call('PUBLISH', channel, table.concat(told, '\\n')) end
if #revoked > 0 then redis.call('PUBLISH', KEYS[4], table.concat(revoked, '\\n')) end
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

# KEYS: outstanding of the engine, runs, fleet channel, outstanding of the own queue. ARGV: batch id, engine, now_s,
# seconds that it took, its size, its model, the worker's own queue that it was sent to ('' for none), how many batches
# go on elsewhere, then two for each of them: outstanding key, id; then three per turn of a conversation that has ended:
# its conversation's turns, its id, its conversation. Who holds the next turn back is told that it may go.
FINISH = """
local own, last = ARGV[7], 8 + 2 * tonumber(ARGV[8])
for i = 9, last, 2 do redis.call('ZADD', ARGV[i], ARGV[3], ARGV[i + 1]) end
redis.call('HDEL', KEYS[2], ARGV[1])
redis.call('ZREM', KEYS[1], ARGV[1])
local left = redis.call('ZCARD', KEYS[1])
local waited_for = {'turns'}
for i = last + 1, #ARGV, 3 do
  redis.call('ZREM', ARGV[i], ARGV[i + 1])
  if redis.call('EXISTS', ARGV[i]) == 1 then waited_for[#waited_for + 1] = ARGV[i + 2] end
end
if own ~= '' then
  redis.call('ZREM', KEYS[4], ARGV[1])
  redis.call('PUBLISH', KEYS[3], table.concat({'own', own, redis.call('ZCARD', KEYS[4])}, '\\t'))
end
if #waited_for > 1 then redis.call('PUBLISH', KEYS[3], table.concat(waited_for, '\\t')) end
redis.call('PUBLISH', KEYS[3], table.concat({'done', ARGV[2], left, ARGV[4], ARGV[5], ARGV[6]}, '\\t'))
"""

# KEYS: two per conversation: its turns, its pin. ARGV: how long turns are remembered in seconds, then per conversation:
# the turn that would go next, how many turns are new, and two for each of those: its place in the order, its id. A turn
# that may go stands before all others from then on, until it has ended. Returns two per conversation: the turn that is
# first now, and the pin ('' where that is not the one that was asked for, or there is none).
TAKE_TURNS = (
    _IS_TERMINAL
    + """
local ttl, at, found = ARGV[1], 2, {}
for i = 1, #KEYS, 2 do
  local turns, wanted, count = KEYS[i], ARGV[at], tonumber(ARGV[at + 1])
  at = at + 2
  for _ = 1, count do
    redis.call('ZADD', turns, 'NX', ARGV[at], ARGV[at + 1])
    at = at + 2
  end
  if count > 0 then redis.call('EXPIRE', turns, ttl) end
  local first = redis.call('ZRANGE', turns, 0, 0)[1]
  while first and first ~= wanted and is_terminal(redis.call('GET', 'celery-task-meta-' .. first)) do
    redis.call('ZREM', turns, first)
    first = redis.call('ZRANGE', turns, 0, 0)[1]
  end
  local pin = ''
  if first == wanted then
    redis.call('ZADD', turns, 'XX', 0, wanted)
    redis.call('EXPIRE', turns, ttl)
    pin = redis.call('GET', KEYS[i + 1]) or ''
  end
  found[#found + 1] = first or ''
  found[#found + 1] = pin
end
return found
"""
)
