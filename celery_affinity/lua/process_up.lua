-- process_up: a slot has a new process, so nothing that an earlier one started runs any more.
--
-- KEYS[1] namespace prefix     ARGV incarnation, slot
-- Returns 1; 0 the worker is not registered (yet)
-- @include base
-- @include ring
-- @include deliver
-- @include lease
-- @include match
-- @include unstart
local inc, i = ARGV[1], ARGV[2]
local w = worker(inc)
if not w then return 0 end
local busy = worker_key(inc, 'busy')
local was_busy = occupied(inc, i)
for _, token in ipairs(redis.call('HKEYS', busy)) do
  if redis.call('HGET', busy, token) == i and token ~= 'away:' .. i then redis.call('HDEL', busy, token) end
end
local l, leased = load_lease(inc, i)
if leased and l.out[1] and l.out[1].token then
  take_back(l, true)
  release(l, true)
  halt_others(l)
  take(inc, i, w)
  match(l.q, 10)
elseif was_busy and not leased then
  take(inc, i, w)
end
return 1
