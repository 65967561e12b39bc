-- rebase: after a jump of the clock or a restart of the server, every heartbeat counts as new. A
-- worker whose rescue has begun has none that counts: the rescue goes on at once.
--
-- KEYS[1] namespace prefix     ARGV queue, fence, cursor
-- Returns {-1} not the leader; {how many, next cursor, 0 when through}
-- @include base
-- @include fence
if not in_term(ARGV[1], ARGV[2]) then return {-1} end
local page = redis.call('ZSCAN', P .. 'workers', ARGV[3], 'COUNT', 100)
for k = 1, #page[2], 2 do
  local w = worker(page[2][k])
  local leaving = redis.call('HGET', worker_key(page[2][k], 'info'), 'state') == 'leaving'
  redis.call('ZADD', P .. 'workers', 'XX', text(NOW + (w and not leaving and w.timeout or 0)), page[2][k])
end
return {#page[2] / 2, tonumber(page[1])}
