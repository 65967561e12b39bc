-- decline: a process will not use the start that a settle granted it: it ends, or something else is next.
--
-- KEYS[1] namespace prefix     ARGV incarnation, slot, entry, epoch, start token
-- Returns 1 the entry counts as not started: its message asks again, or (the node drains, or serves
--         the queue no more; the tag or its queue was paused, moved, or given another limit meanwhile) it
--         goes back to the head of its tag; 0 not this caller's (any more), or its
--         call has mates: it runs
-- @include base
-- @include ring
-- @include deliver
-- @include lease
-- @include match
local inc, i, entry, epoch, token = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local l, leased = load_lease(inc, i)
local first = l.out[1]
if not leased or l.epoch ~= epoch or not first or first.entry ~= entry or first.token ~= token
  or l.mates then
  return 0
end
first.token = nil
local w = worker(inc)
local goes_on = w and w.active and serves(w, l.q, i) and l.cn == 1 and not conf(l.q).still
if goes_on and not on_hold(l.q, l.tag) and not barred(l.q, l.tag, inc) then
  save_lease(l)
  return 1
end
take_back(l, false)
release(l, true)
if w then take(inc, i, w) end
match(l.q, 10)
return 1
