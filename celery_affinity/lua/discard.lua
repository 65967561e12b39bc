-- discard: a dispatched message ended in the node without ever being started.
--
-- KEYS[1] namespace prefix
-- ARGV    incarnation, slot, entry, epoch, send number, 'settle' (revoked, expired) | 'bury'
--         (unknown task, undecodable), reason
-- Returns 1 done; 0 not this caller's (any more), or it has started
-- @include base
-- @include ring
-- @include deliver
-- @include lease
-- @include match
-- @include go_on
local inc, i, entry, epoch, send = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local l, leased = load_lease(inc, i)
if not leased or l.epoch ~= epoch then return 0 end
local k = l.out[1] and l.out[1].entry == entry and 1 or 2
local o = l.out[k]
if not o or o.entry ~= entry or o.send ~= send or o.token then return 0 end
if l.cn > 1 then redis.call('SREM', queue_key(l.q, 'unst'), l.tag) end
if ARGV[6] == 'bury' then
  bury(l.q, entry, l.tag, ARGV[7])
else
  forget_entry(l.q, entry)
  count(l.q, 'settled')
end
if k == 1 then drop_first(l) else l.out[2] = nil end
go_on(l, worker(inc))
return 1
