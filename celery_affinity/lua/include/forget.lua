-- Take a worker out of the ledger: what it held goes back to the head, its keys go.

-- Does at most `budget` leases; returns entries given back and whether more is to be done.
-- `lost`: it did not leave by itself.
local function forget_worker(inc, budget, lost)
  local w = worker(inc)
  local info = worker_key(inc, 'info')
  local touched, back, done = {}, 0, 0
  if w then w.active = false end  -- none of its slots is given anything any more
  for _, i in ipairs(redis.call('SMEMBERS', worker_key(inc, 'leased'))) do
    if done == budget then
      redis.call('HSET', info, 'state', 'leaving')
      return back, true
    end
    local l, leased = load_lease(inc, i)
    if leased then  -- one of a tag that has been halted here may have ended with that
      local given_back = take_back(l, true)
      back = back + given_back
      if lost then count(l.q, 'rescued', given_back) end
      release(l, true)
      halt_others(l)
      touched[l.q] = true
      done = done + 1
    end
  end
  if w then
    for _, i in ipairs(redis.call('SMEMBERS', worker_key(inc, 'idle'))) do
      withdraw_idle(inc, i, w)
    end
  end
  local v = redis.call('HMGET', info, 'cap', 'junk')
  for i = 0, tonumber(v[1] or 0) - 1 do redis.call('DEL', slot_key(inc, i)) end
  for key in string.gmatch(v[2] or '', '[^\n]+') do redis.call('DEL', key) end
  for _, name in ipairs({'info', 'idle', 'leased', 'busy', 'owed', 'lacks'}) do
    redis.call('DEL', worker_key(inc, name))
  end
  redis.call('ZREM', P .. 'workers', inc)
  WORKERS[inc] = nil
  for q in pairs(touched) do match(q, 100) end
  return back, false
end
