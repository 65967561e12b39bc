-- occupy: an ordinary task begins in a slot of this node, or another shard is to have it: it then takes no
-- lease.
--
-- KEYS[1] namespace prefix
-- ARGV    incarnation, slot or '' (a pool whose slots have no identity), token
-- Returns 1; 0 not registered. What was dispatched to the slot but has not started goes to another
-- slot if one is free. Else it stays and is next in this one: affinity and ordinary tasks take turns.
-- Without a free slot the next one that gets free is owed to the task.
-- @include base
-- @include ring
-- @include deliver
-- @include lease
-- @include match
local inc, i, token = ARGV[1], ARGV[2], ARGV[3]
local w = worker(inc)
if not w then return 0 end
local busy = worker_key(inc, 'busy')
if redis.call('HEXISTS', busy, token) == 1 then return 1 end
if i == '' then
  i = redis.call('SRANDMEMBER', worker_key(inc, 'idle')) or '-'
end
redis.call('HSET', busy, token, i)
if i == '-' then
  redis.call('RPUSH', worker_key(inc, 'owed'), token)
  return 1
end
withdraw_idle(inc, i, w)
local l, leased = load_lease(inc, i)
if leased and redis.call('ZCARD', queue_key(l.q, 'idle')) > 0 then
  take_back(l, false)
  if #l.out == 0 then
    release(l, true)
    match(l.q, 10)
  else
    save_lease(l)
  end
end
return 1
