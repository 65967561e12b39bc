-- heartbeat: a node is alive, and these are the dispatched messages that it holds.
--
-- KEYS[1] namespace prefix
-- ARGV    incarnation, beat number, grace in ms, then "slot:entry:epoch:send" of each message
--         that reached the node and has not ended there; with ":?" behind it the node does not know
--         whether a process had taken it: it counts as held if it has started, as missing if not
-- Returns {0} not registered (any more), or a rescue has begun, which then goes on: what it still
--         runs is not its own;
--         {1, sent again, taken back, number of its last change (of queues or slots) in force}
-- A message that was dispatched longer ago than the grace, is not in the worker queue any more and
-- has not arrived is sent again with a new send number. One that started but is no longer held at two
-- beats, a tenth of the heartbeat timeout apart (some beats follow each other at once), is taken back.
-- One whose start was granted is sent again once as if it had not started: its process knows the token,
-- and a copy that comes while it runs is refused. If that does not come to its end either, it counts as
-- one that started (in a ledger that was restored its process knows of no grant any more). As long as the
-- node holds any copy of such a one, that may be the one that runs; if it does not know about those that it
-- may have (":?"), another one is sent.
-- A repeat of a beat number counts no beat twice.
-- What waits for longer than the grace behind an ordinary task goes back to the head if a slot
-- elsewhere, or another one of a node, can take it.
-- @include base
-- @include ring
-- @include deliver
-- @include lease
-- @include match
-- @include unstart
local inc, beat, grace = ARGV[1], ARGV[2], tonumber(ARGV[3])
local w = worker(inc)
if not w then return {0} end
local v = redis.call('HMGET', worker_key(inc, 'info'), 'beat', 'change', 'state')
if v[3] == 'leaving' then return {0} end
redis.call('ZADD', P .. 'workers', text(NOW + w.timeout), inc)
local change = tonumber(v[2] or 0)
if v[1] == beat then return {1, 0, 0, change} end
redis.call('HSET', worker_key(inc, 'info'), 'beat', beat)
-- Whether the worker queue still has this copy; its list is read only when something is missing.
local lists = {}
local function queued(l, o)
  local name = w.lists[l.q]
  lists[name] = lists[name] or redis.call('LRANGE', name, 0, -1)
  local mark = '"affinity_stamp": "' .. table.concat({o.entry, l.epoch, o.send, ''}, ' ')
  for _, message in ipairs(lists[name]) do
    if string.find(message, mark, 1, true) then return true end
  end
  return false
end

-- Whether some slot for the queue is free, or will be as soon as a lease passes on: it has no
-- ordinary task. (Where all have one, a waiting message keeps its turn in its slot.)
local function another_slot(q)
  if redis.call('ZCARD', queue_key(q, 'idle')) > 0 then return true end
  for _, other in ipairs(redis.call('ZRANGE', P .. 'workers', 0, 31)) do
    local o = worker(other)
    if o and o.active and o.slots[q]
      and redis.call('HLEN', worker_key(other, 'busy')) < o.slots[q] then return true end
  end
  return false
end

local ordinary = {}
for _, i in ipairs(redis.call('HVALS', worker_key(inc, 'busy'))) do ordinary[i] = true end
local holds, any_copy, sure_copy = {}, {}, {}
for k = 4, #ARGV do
  local copies = string.match(ARGV[k], '^[^:]*:[^:]*:[^:]*') or ''
  holds[ARGV[k]], any_copy[copies] = true, true
  if string.sub(ARGV[k], -2) ~= ':?' then sure_copy[copies] = true end
end
local again, back = 0, 0
for _, i in ipairs(redis.call('SMEMBERS', worker_key(inc, 'leased'))) do
  local l = load_lease(inc, i)
  local changed, missing = false, false
  for k, o in ipairs(l.out) do
    local copies = table.concat({i, o.entry, l.epoch}, ':')
    local name = copies .. ':' .. o.send
    if not holds[name] then
      local granted = is_granted(l, o) and w.active and serves(w, l.q, i)
      if o.token and not granted then
        missing = not (holds[name .. ':?'] or (was_granted(o) and any_copy[copies]))
      elseif NOW - l.t < grace or not w.active or not serves(w, l.q, i) or queued(l, o) then
        -- it is on its way
      elseif granted and string.sub(o.send, -1) == 'r' and (sure_copy[copies] or not any_copy[copies]) then
        missing = not any_copy[copies]
      else
        l.x = l.x + 1
        o.send = text(l.x) .. 'r'
        l.t = NOW
        if deliver(l, k, w) then
          again = again + 1
          count(l.q, 'resent')
        end
        changed = true
      end
    end
  end
  local missed = l.miss
  l.miss = missing and (missed > 0 and missed or NOW) or 0
  if l.miss ~= missed then changed = true end
  if missing and missed > 0 and NOW - missed >= w.timeout / 10 then
    back = back + take_back(l, true)
    release(l, true)
    halt_others(l)
    take(inc, i, w)
    match(l.q, 10)
  elseif ordinary[i] and l.out[1] and not l.out[1].token and NOW - l.t >= grace
    and another_slot(l.q) then
    take_back(l, false)
    release(l, true)
    match(l.q, 10)
  elseif changed then
    save_lease(l)
  end
end
return {1, again, back, change}
