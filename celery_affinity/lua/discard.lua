-- discard: a dispatched message ended in the node without ever being started.
--
-- KEYS[1] namespace prefix
-- ARGV    incarnation, slot, entry, epoch, send number, 'alone' if no other copy of it is in the node
--         (else ''), 'settle' (revoked, expired) | 'bury' (undecodable), reason | 'unknown', name of the
--         task that this worker does not know
-- Returns 0 not this caller's (any more), or it has started; 1 done;
--         2 requeued, for a worker that knows the task or has not tried yet (else it is buried, and
--         the caller tells whoever waits for its result, then says so: known.lua)
-- A repeat (lost reply) gets the same answer, for any copy of the entry: after a 0 its message goes on
-- to its process, which may have been granted its start.
-- @include base
-- @include ring
-- @include deliver
-- @include lease
-- @include match
-- @include unstart
-- @include proceed
-- @include go_on

local inc, i, entry, epoch, send = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local this = entry .. ' ' .. epoch .. ' '
local last = redis.call('HGET', slot_key(inc, i), 'discarded') or ''
if string.sub(last, 1, #this) == this then return tonumber(string.sub(last, #this + 1)) end
local function answered(answer)
  redis.call('HSET', slot_key(inc, i), 'discarded', this .. answer)
  return answer
end
local l, leased = load_lease(inc, i)
if not leased or l.epoch ~= epoch then return 0 end
local k = l.out[1] and l.out[1].entry == entry and 1 or 2
local o = l.out[k]
if not o or o.entry ~= entry or o.send ~= send then return 0 end
-- One whose start was granted has not begun if this was its only copy, and no later one gets further.
if o.token and not (is_granted(l, o) and ARGV[6] == 'alone') then return 0 end
if l.cn > 1 then redis.call('SREM', queue_key(l.q, 'unst'), l.tag) end
if ARGV[7] == 'unknown' then
  redis.call('SADD', worker_key(inc, 'lacks'), ARGV[8])
  if may_be_known(l.q, ARGV[8]) then
    redis.call('HSET', queue_key(l.q, 'needs'), l.tag, ARGV[8])
    redis.call('HSETNX', queue_key(l.q, 'conf'), 'lacking', '0')  -- forget_needs (promote) looks on from there
    conf(l.q).lacking = true
    put_back(l.q, l.tag, entry)
    if k == 1 then drop_first(l) else l.out[2] = nil end
    take_back(l, false)
    l.n = l.n - 1
    go_on(l, worker(inc))
    return answered(2)
  end
  bury(l.q, entry, l.tag, 'unknown task ' .. ARGV[8], nil, 'soon')
elseif ARGV[7] == 'bury' then
  bury(l.q, entry, l.tag, ARGV[8])
else
  forget_entry(l.q, entry)
  count(l.q, 'settled')
end
if k == 1 then drop_first(l) else l.out[2] = nil end
go_on(l, worker(inc))
return answered(1)
