-- start: may this copy of a dispatched message run?
--
-- KEYS[1] namespace prefix
-- ARGV    incarnation, slot, entry, epoch, send number, start token, for how long it must have its
--         lease at least (ms)
-- Returns 1 run it (also to a repeat with the same token: a lost reply);
--         -1 its lease is over; -2 an older copy; -3 another copy started it;
--         -4 the message before it has not ended: it was given back, and comes again;
--         -5 ask again: the worker's heartbeat is late, and its lease may be over too soon
-- @include base
local inc, i, entry, epoch, send, token = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local v = redis.call('HMGET', slot_key(inc, i), 'epoch', 'e1', 's1', 'k1', 'e2', 's2', 'cn', 'q', 'tag')
if v[1] ~= epoch then return -1 end
local due = tonumber(redis.call('ZSCORE', P .. 'workers', inc) or 0)
if due - NOW < tonumber(ARGV[7]) then return -5 end
if v[2] == entry then
  if v[4] then return v[4] == token and 1 or -3 end
  if v[3] ~= send then return -2 end
  redis.call('HSET', slot_key(inc, i), 'k1', token, 'began', text(NOW))
  if is_sampled(entry) then
-- @include waits
    note_wait(v[8], entry)
  end
  if tonumber(v[7]) == 1 then return 1 end
elseif v[5] ~= entry then
  return -1
elseif v[6] ~= send then
  return -2
end
-- @include ring
-- @include deliver
-- @include lease
-- @include match
if v[2] == entry then
  redis.call('SREM', queue_key(v[8], 'unst'), v[9])
  enlist(v[8], v[9])
  match(v[8], 10)
  return 1
end
local l = load_lease(inc, i)
put_back(l.q, l.tag, entry)
l.out[2] = nil
l.n = l.n - 1
save_lease(l)
return -4
