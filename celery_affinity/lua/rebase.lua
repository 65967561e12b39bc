-- rebase: after a jump of the clock or a restart of the server, every heartbeat counts as new; after
-- a time without answers each gets that time more. A worker whose rescue has begun has none that
-- counts: the rescue goes on at once.
--
-- KEYS[1] namespace prefix     ARGV queue, fence, cursor, ms more (left out: as new)
-- Returns {-1} not the leader; {how many, next cursor, 0 when through}
-- @include base
-- @include fence
if not in_term(ARGV[1], ARGV[2]) then return {-1} end
local page = redis.call('ZSCAN', P .. 'workers', ARGV[3], 'COUNT', 100)
for k = 1, #page[2], 2 do
  local w = worker(page[2][k])
  local due = NOW + (w and w.timeout or 0)
  if ARGV[4] then due = math.min(due, tonumber(page[2][k + 1]) + tonumber(ARGV[4])) end
  if redis.call('HGET', worker_key(page[2][k], 'info'), 'state') == 'leaving' then due = NOW end
  redis.call('ZADD', P .. 'workers', 'XX', text(due), page[2][k])
end
return {#page[2] / 2, tonumber(page[1])}
