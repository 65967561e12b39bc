-- set_aside: put what was taken off another broker behind what an evacuation gives back to it, each of them once.
--
-- KEYS[1] namespace prefix
-- ARGV    queue, token of this request, how long a tombstone is kept (ms), how many at most, then of each
--         message, oldest first: its identity, 'again' if the broker may have sent it before, else '', and the
--         message
-- Returns 1; 0 the queue is not evacuated (any more): the messages stay with the broker. A repeat changes nothing.
-- The tombstones are those of carry: what is in the ledger already is left out.
-- @include base
-- @include each_once
local q, answer = ARGV[1], queue_key(ARGV[1], 'done:' .. ARGV[2])
if redis.call('EXISTS', answer) == 1 then return 1 end
if not conf(q).stopped then return 0 end
each_once(q, queue_key(q, 'back'), 5, tonumber(ARGV[3]), tonumber(ARGV[4]))
redis.call('SET', answer, '1', 'PX', 60000)
return 1
