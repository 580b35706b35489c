"""The Lua scripts: every move of a message between a list and a claims hash is one of these.

A Redis over its memory limit refuses growing commands, inside a script only until the script's first write.
So each script begins with a write that frees memory: a full Redis can still be drained, and heartbeats go on.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Script:
    """Source of a script and the name under which Redis caches it."""

    source: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sha", hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest())


FENCED = -1
STALE = -2

# Heartbeat counters of consumers that are given up.
DEAD = -1
RESIGNED = -2

# Death counts of messages nobody fetched again (a purged queue) go away after a week without another death.
_DEATHS_KEPT_S = 7 * 24 * 3600

_GIVE_BACK = f"""
local function give_back(claims, deliveries, tag, counted)
    local value = redis.call('HGET', claims, tag)
    if not value then return 0 end
    redis.call('HDEL', claims, tag)
    local size, at = string.match(value, '^(%d+):()')
    local payload = string.sub(value, at + size)
    local list = string.sub(value, at, at + size - 1)
    if redis.call('TYPE', list).ok == 'string' then list = redis.call('GET', list) end
    redis.call('RPUSH', list, payload)
    if counted then
        redis.call('HINCRBY', deliveries, redis.sha1hex(payload), 1)
        redis.call('EXPIRE', deliveries, {_DEATHS_KEPT_S})
    end
    return 1
end
"""

# KEYS: beats, floors, deliveries, claims, then list keys level by level, best level first.
# ARGV: consumer, first tag, room, lists per level, whether lists of one level share the room.
# Returns {0, {{list number, payloads}, ...}, {{tag, digest, deaths}, ...}}.
CLAIM = Script("""
local consumer, tag, room = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local per_level, shared = tonumber(ARGV[4]), ARGV[5] == '1'
if tonumber(redis.call('HGET', KEYS[1], consumer) or '-1') < 0 then return {-1} end
if tag <= tonumber(redis.call('HGET', KEYS[2], consumer) or '0') then return {-2} end
local last = tag + room - 1
local groups, suspects = {}, {}

local function book(key, payloads)
    local head = #key .. ':' .. key
    for from = 1, #payloads, 1000 do
        local fields = {}
        for i = from, math.min(from + 999, #payloads) do
            fields[#fields + 1] = string.format('%d', tag + i - 1)
            fields[#fields + 1] = head .. payloads[i]
        end
        redis.call('HSET', KEYS[4], unpack(fields))
    end
end

local function look_up_deaths(payloads)
    for from = 1, #payloads, 1000 do
        local digests = {}
        for i = from, math.min(from + 999, #payloads) do
            digests[#digests + 1] = redis.sha1hex(payloads[i])
        end
        for i, deaths in ipairs(redis.call('HMGET', KEYS[3], unpack(digests))) do
            if deaths then
                suspects[#suspects + 1] = {tag + from + i - 2, digests[i], tonumber(deaths)}
            end
        end
    end
end

local has_deaths = redis.call('EXISTS', KEYS[3]) == 1
local function take(number, limit)
    local payloads = redis.pcall('RPOP', KEYS[4 + number], math.min(limit, room))
    if payloads and payloads.err then
        if string.find(payloads.err, 'WRONGTYPE', 1, true) then return 0 end  -- it is closed
        error(payloads.err)
    end
    if not payloads then return 0 end
    book(KEYS[4 + number], payloads)
    if has_deaths then look_up_deaths(payloads) end
    groups[#groups + 1] = {number, payloads}
    tag = tag + #payloads
    room = room - #payloads
    return #payloads
end

for level = 0, #KEYS - 5, per_level do
    local may_have_more = {}
    local share = shared and math.ceil(room / per_level) or 0
    for number = level + 1, level + per_level do
        if share == 0 or (room > 0 and take(number, share) == share) then
            may_have_more[#may_have_more + 1] = number
        end
    end
    for _, number in ipairs(may_have_more) do
        if room > 0 then take(number, room) end
    end
end
if #groups > 0 then redis.call('HSET', KEYS[2], consumer, string.format('%d', last)) end
return {0, groups, suspects}
""")

# KEYS: claims, deliveries. ARGV: tags, the last to be consumed first. Returns how many went back.
GIVE_BACK = Script(
    _GIVE_BACK
    + """
local moved = 0
for i = 1, #ARGV do moved = moved + give_back(KEYS[1], KEYS[2], ARGV[i], false) end
return moved
"""
)

# KEYS: claims, deliveries. ARGV: number of tags, tags, number of digests, digests, then per command its
# number of words and its words. Returns {'ok', replies}, {'lost', tags} or {'error', index, reason}.
SETTLE = Script("""
local at = 1
local function next_list()
    local count = tonumber(ARGV[at])
    local list = {unpack(ARGV, at + 1, at + count)}
    at = at + 1 + count
    return list
end
local tags, digests = next_list(), next_list()
local values, lost = redis.call('HMGET', KEYS[1], unpack(tags)), {}
for i, value in ipairs(values) do
    if not value then lost[#lost + 1] = tags[i] end
end
if #lost > 0 then return {'lost', lost} end
redis.call('HDEL', KEYS[1], unpack(tags))
local replies = {}
while at <= #ARGV do
    local reply = redis.pcall(unpack(next_list()))
    if type(reply) == 'table' and reply.err then
        for i, value in ipairs(values) do redis.call('HSET', KEYS[1], tags[i], value) end
        return {'error', #replies, reply.err}
    end
    replies[#replies + 1] = reply
end
if #digests > 0 then redis.call('HDEL', KEYS[2], unpack(digests)) end
return {'ok', replies}
""")

# KEYS: beats. ARGV: consumer. Begins a consumer's life.
REGISTER = Script("""
redis.call('HDEL', KEYS[1], ARGV[1])
return redis.call('HSET', KEYS[1], ARGV[1], 0)
""")

# KEYS: beats, floors, claims. ARGV: consumer. Ends a consumer's life if it holds nothing; 1 if it ended.
DEREGISTER = Script("""
if redis.call('HLEN', KEYS[3]) > 0 then return 0 end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('HDEL', KEYS[2], ARGV[1])
return 1
""")

# KEYS: beats. ARGV: consumer. Counts one heartbeat; returns {0, every consumer and count} or {-1} when fenced.
BEAT = Script("""
local count = tonumber(redis.call('HGET', KEYS[1], ARGV[1]) or '-1')
if count < 0 then return {-1} end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('HSET', KEYS[1], ARGV[1], string.format('%d', count + 1))
return {0, redis.call('HGETALL', KEYS[1])}
""")

# KEYS: beats, floors, claims. ARGV: consumer, tag up to which no claim may arrive any more.
# Returns {0, tags in Redis} or {-1} when fenced.
RECOVER = Script("""
if tonumber(redis.call('HGET', KEYS[1], ARGV[1]) or '-1') < 0 then return {-1} end
redis.call('HDEL', KEYS[2], ARGV[1])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
return {0, redis.call('HKEYS', KEYS[3])}
""")

# KEYS: beats. ARGV: consumer, observed count ('' for any), counter that says why it is given up. Gives a consumer
# up if nothing was heard of it since; 1 if it is given up now.
CONDEMN = Script("""
local count = redis.call('HGET', KEYS[1], ARGV[1])
if count and tonumber(count) < 0 then return 1 end
if ARGV[2] ~= '' and count ~= ARGV[2] then return 0 end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
return 1
""")

# KEYS: beats, floors, claims, deliveries. ARGV: consumer, tags, the last to be consumed first. Takes claims back
# from a consumer that is given up, counts them if it died, and forgets it when none is left. Returns how many moved.
RECLAIM = Script(
    _GIVE_BACK
    + """
local count = tonumber(redis.call('HGET', KEYS[1], ARGV[1]) or '0')
if count >= 0 then return 0 end
local moved = 0
for i = 2, #ARGV do moved = moved + give_back(KEYS[3], KEYS[4], ARGV[i], count == -1) end
if redis.call('HLEN', KEYS[3]) == 0 then
    redis.call('HDEL', KEYS[1], ARGV[1])
    redis.call('HDEL', KEYS[2], ARGV[1])
end
return moved
"""
)

# KEYS: list, the list that its messages go to. Moves what waits, in its order, to be consumed next; from then on the
# first list's key holds the name of the second: what is pushed to it is refused, and what is given back goes there.
CLOSE_QUEUE = Script(f"""
local moved = 0
if redis.call('TYPE', KEYS[1]).ok == 'list' then
    while redis.call('LMOVE', KEYS[1], KEYS[2], 'LEFT', 'RIGHT') do moved = moved + 1 end
end
redis.call('SET', KEYS[1], KEYS[2], 'EX', {_DEATHS_KEPT_S})
return moved
""")

# KEYS: list. Takes back that it was closed.
OPEN_QUEUE = Script("""
if redis.call('TYPE', KEYS[1]).ok == 'string' then redis.call('DEL', KEYS[1]) end
return 1
""")
