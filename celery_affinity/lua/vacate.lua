-- vacate: an ordinary task has ended; its slot takes leases again.
--
-- KEYS[1] namespace prefix     ARGV incarnation, token
-- Returns 1; 0 nothing was noted under the token
-- @include base
-- @include ring
-- @include deliver
-- @include lease
-- @include match
local inc, token = ARGV[1], ARGV[2]
local w = worker(inc)
local i = redis.call('HGET', worker_key(inc, 'busy'), token)
if not w or not i then return 0 end
redis.call('HDEL', worker_key(inc, 'busy'), token)
if i == '-' then
  redis.call('LREM', worker_key(inc, 'owed'), 1, token)
  return 1
end
local _, leased = load_lease(inc, i)
if not leased then take(inc, i, w) end
return 1
