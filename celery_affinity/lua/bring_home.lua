-- bring_home: put what an inbox still holds in front of the pending list, now that the broker is the ledger's Redis.
--
-- KEYS[1] namespace prefix   KEYS[2] pending list, without a priority
-- ARGV    queue, fence, how many at most
-- Returns -1 not the leader; how many were moved
-- The youngest first, so that the order holds between two calls. A full memory refuses the first write: then
-- they stay where they are. A repeat (lost reply) moves what is left.
-- @include base
-- @include fence
local q, fence, most = ARGV[1], ARGV[2], tonumber(ARGV[3])
if not in_term(q, fence) then return -1 end
local inbox = queue_key(q, 'inbox')
local moved = 0
while moved < most do
  local raw = redis.call('LINDEX', inbox, 0)
  if not raw then break end
  redis.call('RPUSH', KEYS[2], raw)
  redis.call('LPOP', inbox)
  moved = moved + 1
end
return moved
