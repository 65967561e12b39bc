-- serve: a running node changes which queues it serves, or how many slots it has.
--
-- KEYS[1] namespace prefix
-- ARGV    incarnation, number of the change, slots, queues and keys to delete as for register,
--         how many leases at most
-- Returns {-1, 0, 0} not registered; {0, 0, 0} a later change is in force: nothing was done;
--         {1, given back, more}
-- What a slot or queue that went has out and has not started goes back to the head of its tag;
-- what runs there runs to its end. A repeat with the same number goes on where the last one stopped.
-- @include base
-- @include ring
-- @include deliver
-- @include lease
-- @include match
local inc, change, size, budget = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[6])
local before = worker(inc)
if not before then return {-1, 0, 0} end
local info = worker_key(inc, 'info')
local v = redis.call('HMGET', info, 'change', 'cap')
if change < tonumber(v[1] or 0) then return {0, 0, 0} end

for _, i in ipairs(redis.call('SMEMBERS', worker_key(inc, 'idle'))) do
  withdraw_idle(inc, i, before)
end
redis.call('HSET', info, 'change', ARGV[2], 'slots', ARGV[3],
  'cap', text(math.max(size, tonumber(v[2]))), 'queues', ARGV[4], 'junk', ARGV[5])
WORKERS[inc] = nil
local w = worker(inc)
local taken = {}
for _, i in ipairs(redis.call('HVALS', worker_key(inc, 'busy'))) do taken[i] = true end
local leased = redis.call('SMEMBERS', worker_key(inc, 'leased'))
for _, i in ipairs(leased) do taken[i] = true end
for i = 0, size - 1 do
  if w.active and not taken[text(i)] then
    if redis.call('EXISTS', worker_key(inc, 'owed')) == 1 then
      take(inc, text(i), w)
    else
      offer_idle(inc, text(i), w)
    end
  end
end

local touched = {}
for _, q in ipairs(before.queues) do
  touched[q] = true
  -- All that is left in there has been taken back, or is about to be: no copy of it may run.
  if not w.lists[q] then redis.call('DEL', before.lists[q]) end
end
for _, q in ipairs(w.queues) do touched[q] = true end

local back, done, more = 0, 0, 0
for _, i in ipairs(leased) do
  local l = load_lease(inc, i)
  local out = #l.out
  if not serves(w, l.q, i) and out > 0 and not (out == 1 and l.out[1].token) then
    if done == budget then
      more = 1
      break
    end
    done = done + 1
    touched[l.q] = true
    take_back(l, false)
    back = back + out - #l.out
    if #l.out == 0 then
      release(l, true)
      take(inc, i, w)
    else
      save_lease(l)
    end
  end
end
for q in pairs(touched) do match(q, 100) end
return {1, back, more}
