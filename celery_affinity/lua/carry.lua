-- carry: put messages that were taken from another broker into the inbox, each of them once.
--
-- KEYS[1] namespace prefix
-- ARGV    queue, token of this request, fence, how long a tombstone is kept (ms), how many at most, then of
--         each message, oldest first: its identity, 'again' if the broker may have sent it before, else
--         '', and the message
-- Returns {-1} not the leader; {-2} the queue is evacuated; {carried, length of the inbox}
-- Each gets a tombstone. One that may have come before and has a tombstone already was carried, and may
-- have run since: it is not carried again. A repeat (lost reply) gets the same answer.
-- The first write is one that a full memory refuses: then the messages stay with the broker.
-- @include base
-- @include fence
-- @include each_once
local q, token, fence, kept_ms, most = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
if not in_term(q, fence) then return {-1} end
if conf(q).stopped then return {-2} end
local inbox, answer = queue_key(q, 'inbox'), queue_key(q, 'answer')
-- A leader asks for one thing at a time: only its last request can come again.
local last, before = string.match(redis.call('GET', answer) or '', '^(%S+) (%d+)$')
if last == token then return {tonumber(before), redis.call('LLEN', inbox)} end

local done = each_once(q, inbox, 6, kept_ms, most)
redis.call('SET', answer, token .. ' ' .. done, 'PX', 60000)
return {done, redis.call('LLEN', inbox)}
