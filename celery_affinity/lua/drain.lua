-- drain: a stopping node takes no more; what has not started goes back to the head of its tag.
--
-- KEYS[1] namespace prefix     ARGV incarnation, how many leases at most
-- Returns {given back, more}; {0, 0} if it is not registered
-- @include base
-- @include ring
-- @include deliver
-- @include lease
-- @include match
local inc, budget = ARGV[1], tonumber(ARGV[2])
local w = worker(inc)
if not w then return {0, 0} end
redis.call('HSET', worker_key(inc, 'info'), 'state', 'draining')
w.active = false
for _, i in ipairs(redis.call('SMEMBERS', worker_key(inc, 'idle'))) do withdraw_idle(inc, i, w) end
local back, done = 0, 0
for _, i in ipairs(redis.call('SMEMBERS', worker_key(inc, 'leased'))) do
  local l = load_lease(inc, i)
  local out = #l.out
  if out > 0 and not (out == 1 and l.out[1].token) then
    if done == budget then return {back, 1} end
    done = done + 1
    take_back(l, false)
    back = back + out - #l.out
    if #l.out == 0 then release(l, true) else save_lease(l) end
  end
end
for _, q in ipairs(w.queues) do match(q, 100) end
return {back, 0}
