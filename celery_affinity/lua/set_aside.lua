-- set_aside: put what is younger behind what an evacuation gives back to another broker: what its inbox still holds,
-- and what was taken off that broker, each of them once.
--
-- KEYS[1] namespace prefix
-- ARGV    queue, token of this request, how long a tombstone is kept (ms), how many at most, how many of the inbox
--         at most, then of each message that was taken, oldest first: its identity, 'again' if the broker may have
--         sent it before, else '', and the message
-- Returns 1; 2 there is more in the inbox, ask again; 0 the queue is not evacuated (any more): the messages stay
--         where they are. A repeat (lost reply) changes nothing but the inbox.
-- The tombstones are those of carry: what is in the ledger already is left out.
-- @include base
-- @include each_once
local q, most_of_inbox = ARGV[1], tonumber(ARGV[5])
local back, inbox, answer = queue_key(q, 'back'), queue_key(q, 'inbox'), queue_key(q, 'done:' .. ARGV[2])
if redis.call('EXISTS', answer) == 1 then return 1 end
if not conf(q).stopped then return 0 end
for _ = 1, most_of_inbox do
  local raw = redis.call('LINDEX', inbox, -1)
  if not raw then break end
  redis.call('LPUSH', back, raw)
  redis.call('RPOP', inbox)
end
if redis.call('EXISTS', inbox) == 1 then return 2 end
each_once(q, back, 6, tonumber(ARGV[3]), tonumber(ARGV[4]))
redis.call('SET', answer, '1', 'PX', 60000)
return 1
