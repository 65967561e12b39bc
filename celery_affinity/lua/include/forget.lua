-- Take a worker out of the ledger: what it held goes back to the head, its keys go.

-- A worker's leases of one tag. They go back in one step: with another step between, the younger of two
-- entries that ran there could start again before the older one is back.
local function leases_together(l)
  local together = {l}
  for _, slot in ipairs(holders(l.q, l.tag)) do
    local inc, i = string.match(slot, '^([^:]+):(.+)$')
    if inc == l.inc and i ~= l.i then together[#together + 1] = load_lease(inc, i) end
  end
  return together
end

-- Does at most `budget` leases, and those of the last one's tag; returns entries given back and whether
-- more is to be done. `lost`: it did not leave by itself.
local function forget_worker(inc, budget, lost)
  local w = worker(inc)
  local info = worker_key(inc, 'info')
  local touched, back, done = {}, 0, 0
  if w then w.active = false end  -- none of its slots is given anything any more
  for _, i in ipairs(redis.call('SMEMBERS', worker_key(inc, 'leased'))) do
    local l, leased = load_lease(inc, i)
    if leased and done >= budget then
      redis.call('HSET', info, 'state', 'leaving')
      return back, true
    elseif leased then  -- else it has gone back with another one of its tag
      local together = leases_together(l)
      for _, one in ipairs(together) do
        local given_back = take_back(one, true)
        back = back + given_back
        if lost then count(l.q, 'rescued', given_back) end
      end
      for _, one in ipairs(together) do release(one, true) end
      halt_others(l)
      touched[l.q] = true
      done = done + #together
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
