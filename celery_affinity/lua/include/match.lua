-- Bring free slots and ready tags together.

local function offer_idle(inc, i, w)
  redis.call('SADD', worker_key(inc, 'idle'), i)
  for _, q in ipairs(w.queues) do
    if serves(w, q, i) then
      redis.call('ZADD', queue_key(q, 'idle'), text(NOW), inc .. ':' .. i)
    end
  end
end

local function withdraw_idle(inc, i, w)
  redis.call('SREM', worker_key(inc, 'idle'), i)
  for _, q in ipairs(w.queues) do redis.call('ZREM', queue_key(q, 'idle'), inc .. ':' .. i) end
end

local function next_tag(q)
  if conf(q).stopped then return nil end
  for _ = 1, 10 do
    local popped = redis.call('ZPOPMIN', queue_key(q, 'ring'))
    if not popped[1] then return nil end
    if redis.call('EXISTS', backlog_key(q, popped[1])) == 1 then return popped[1] end
  end
  return nil
end

local function occupied(inc, i)
  for _, slot in ipairs(redis.call('HVALS', worker_key(inc, 'busy'))) do
    if slot == i then return true end
  end
  return false
end

-- Find work for a free slot, in turn over the worker's queues, or mark it as free. A slot that
-- an ordinary task is owed goes to that one first.
local function take(inc, i, w)
  local gone = w.size and tonumber(i) >= w.size
  if not w.active or gone or occupied(inc, i) then return end
  local owed = redis.call('LPOP', worker_key(inc, 'owed'))
  if owed then
    redis.call('HSET', worker_key(inc, 'busy'), owed, i)
    return
  end
  local turn = 0
  if #w.queues > 1 then turn = redis.call('HINCRBY', worker_key(inc, 'info'), 'turn', 1) end
  for step = 1, #w.queues do
    local q = w.queues[(turn + step) % #w.queues + 1]
    local tag = serves(w, q, i) and next_tag(q)
    if tag and open_lease(q, tag, inc, i, w) then return end
  end
  offer_idle(inc, i, w)
end

-- The slot for a tag: the one that had it last, else with several leases one of a node that
-- holds it already, else the one that is free for the longest time.
local function pick_slot(q, tag)
  local idle = queue_key(q, 'idle')
  local warm = redis.call('HGET', queue_key(q, 'warm'), tag)
  if warm and redis.call('ZSCORE', idle, warm) then return warm end
  local held = holders(q, tag)
  if #held > 0 then
    for _, slot in ipairs(redis.call('ZRANGE', idle, 0, 63)) do
      if string.match(slot, '^[^:]+') == string.match(held[1], '^[^:]+') then return slot end
    end
  end
  return redis.call('ZRANGE', idle, 0, 0)[1]
end

-- Dispatch ready tags to free slots, at most `budget`; the leader's bell rings if more remain.
local function match(q, budget)
  for _ = 1, budget do
    if redis.call('ZCARD', queue_key(q, 'idle')) == 0 then return end
    local tag = next_tag(q)
    if not tag then return end
    local slot = pick_slot(q, tag)
    local inc, i = string.match(slot, '^([^:]+):(.+)$')
    local w = worker(inc)
    withdraw_idle(inc, i, w or {queues = {q}})
    if w and w.active then
      if not open_lease(q, tag, inc, i, w) then offer_idle(inc, i, w) end
    else
      enlist(q, tag, true)
    end
  end
  if not conf(q).stopped and redis.call('ZCARD', queue_key(q, 'ring')) > 0
    and redis.call('ZCARD', queue_key(q, 'idle')) > 0 then ring_bell(q) end
end
