-- lost: the process that ran a started task is gone, says its parent.
--
-- KEYS[1] namespace prefix
-- ARGV    incarnation, slot, entry, epoch, queue
-- Returns 'settled' it had settled before (or its lease is over); 'requeued' it runs again;
--         'buried' it had its last delivery: the parent tells whoever waits for its result, then says
--         so (known.lua); the leader does it if that is not said in time. If another call has buried it
--         before (process_up) and the leader has told already, it is 'settled'.
-- @include base
-- @include ring
-- @include deliver
-- @include lease
-- @include match
-- @include unstart
local inc, i, entry, epoch = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local l, leased = load_lease(inc, i)
if not leased or l.epoch ~= epoch or not l.out[1] or l.out[1].entry ~= entry then
  local untold = queue_key(ARGV[5], 'untold')
  if redis.call('LPOS', untold, entry) then
    redis.call('LREM', untold, 1, entry)
    is_about_to_tell(ARGV[5], entry)
  end
  return redis.call('ZSCORE', queue_key(ARGV[5], 'telling'), entry) and 'buried' or 'settled'
end
-- The lease ends with the process: what is dispatched to its successor has a new epoch.
take_back(l, true, true)
release(l, true)
halt_others(l)
local w = worker(inc)
if w then take(inc, i, w) end
match(l.q, 10)
return redis.call('HEXISTS', queue_key(l.q, 'dead'), entry) == 1 and 'buried' or 'requeued'
