-- carry: put messages that were taken from another broker into the inbox, each of them once.
--
-- KEYS[1] namespace prefix
-- ARGV    queue, token of this request, fence, how many shards the caller spreads the queue over, how long a
--         tombstone is kept (ms), how many at most, then of each message, oldest first: its identity,
--         'again' if the broker may have sent it before, else '', and the message
-- Returns {-1} not the leader; {-2} the queue is evacuated; {-3, shards} the ledger has another number of
--         shards; {carried, length of the inbox}
-- The fence is the leader's. In a shard but the first, which has another leader, it is the term of the first
-- one's, and the latest that was heard of here is the one in force: so each carrier calls here before it
-- takes anything, without messages. It does so only if the first shard is not evacuated, which is stopped first and
-- resumed last: what is stopped here then was left so by an evacuation of another number of shards.
-- Each gets a tombstone. One that may have come before and has a tombstone already was carried, and may
-- have run since: it is not carried again. A repeat (lost reply) gets the same answer.
-- The first write is one that a full memory refuses: then the messages stay with the broker.
-- @include base
-- @include fence
-- @include each_once
local q, token, fence, shards = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local kept_ms, most = tonumber(ARGV[5]), tonumber(ARGV[6])
local term = tonumber(string.match(fence, '^%d+$'))
local heard = term and tonumber(redis.call('HGET', queue_key(q, 'c'), 'carrier') or 0)
if term and term < heard or not term and not in_term(q, fence) then return {-1} end
local found = redis.call('HGET', queue_key(q, 'conf'), 'shards')
if found and found ~= shards then return {-3, tonumber(found)} end
if term and term > heard then redis.call('HSET', queue_key(q, 'c'), 'carrier', fence) end
if term and #ARGV == 6 and conf(q).stopped and redis.call('EXISTS', queue_key(q, 'stage')) == 0 then
  redis.call('HDEL', queue_key(q, 'conf'), 'evac')
  conf(q).stopped = nil
end
if conf(q).stopped then return {-2} end
local inbox, answer = queue_key(q, 'inbox'), queue_key(q, 'answer')
-- A leader asks for one thing at a time: only its last request can come again.
local last, before = string.match(redis.call('GET', answer) or '', '^(%S+) (%d+)$')
if last == token then return {tonumber(before), redis.call('LLEN', inbox)} end

local done = each_once(q, inbox, 7, kept_ms, most)
redis.call('SET', answer, token .. ' ' .. done, 'PX', 60000)
return {done, redis.call('LLEN', inbox)}
