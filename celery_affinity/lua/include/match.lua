-- Bring free slots and ready tags together.

-- Tags and slots that one step looks at to find a pair that fits.
local LOOK = 64

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

-- Whether a tag that was in the ring has a backlog and room. (One whose limit was lowered since may have
-- no room; the release of a slot that holds it brings it back.)
local function is_ready(q, tag)
  local room = #holders(q, tag) < concurrency(q, tag)
  if room and redis.call('EXISTS', backlog_key(q, tag)) == 1 then return true end
  if conf(q).warm_wait > 0 then redis.call('HDEL', queue_key(q, 'since'), tag) end
  return false
end

-- Take the first tag that is ready off the ring; its place, to put it back.
local function pop_tag(q)
  if conf(q).still then return nil end
  for _ = 1, LOOK do
    local popped = redis.call('ZPOPMIN', queue_key(q, 'ring'))
    if not popped[1] then return nil end
    if is_ready(q, popped[1]) then return popped[1], popped[2] end
  end
  return nil
end

local function put_aside(aside, tag, place)
  aside[#aside + 1] = place
  aside[#aside + 1] = tag
end

local function put_back_aside(q, aside)
  if #aside > 0 then redis.call('ZADD', queue_key(q, 'ring'), unpack(aside)) end
end

-- A slot stays free, and the step has looked at no more than the ring's first tags, which it may not have
-- now: the leader looks on behind them (look_on), anew if it is about to.
local function leave_look(q)
  redis.call('HSET', queue_key(q, 'look'), 'anew', '1')
  ring_bell(q)
end

-- Milliseconds until a tag that was put aside stops waiting for its warm slot, if any was.
local PATIENCE = nil

-- The slot that a tag still waits for (warm_wait), or nil.
local function awaited_slot(q, tag)
  if conf(q).warm_wait == 0 or destination(q, tag) then return nil end
  local warm = redis.call('HGET', queue_key(q, 'warm'), tag)
  if not warm then return nil end
  local inc, i = string.match(warm, '^([^:]+):(.+)$')
  local w = worker(inc)
  if not w or not w.active or not serves(w, q, i) then return nil end
  local since = tonumber(redis.call('HGET', queue_key(q, 'since'), tag) or 0)
  local left = since + conf(q).warm_wait - NOW
  if left <= 0 then return nil end
  PATIENCE = math.min(PATIENCE or left, left)
  return warm
end

-- The first tag of the ring that may go to this slot.
local function next_tag(q, inc, i)
  local aside, found, all = {}, nil, false
  for _ = 1, LOOK do
    local tag, place = pop_tag(q)
    if not tag then
      all = true
      break
    end
    local awaited = awaited_slot(q, tag)
    if (not awaited or awaited == inc .. ':' .. i) and not barred(q, tag, inc) then
      found = tag
      break
    end
    put_aside(aside, tag, place)
  end
  put_back_aside(q, aside)
  if not found and not all then leave_look(q) end
  return found
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
    local tag = serves(w, q, i) and next_tag(q, inc, i)
    if PATIENCE then ring_bell(q) end
    if tag and open_lease(q, tag, inc, i, w) then return end
  end
  offer_idle(inc, i, w)
end

local function free_slot(q, inc)
  for _, i in ipairs(redis.call('SMEMBERS', worker_key(inc, 'idle'))) do
    if redis.call('ZSCORE', queue_key(q, 'idle'), inc .. ':' .. i) then return inc .. ':' .. i end
  end
  return nil
end

-- The slot for a tag: one of the worker that it was sent to, else the one that had it last, else with
-- several leases one of a node that holds it already, else the one that is free for the longest time;
-- nil if none may have it now.
local function pick_slot(q, tag)
  local idle = queue_key(q, 'idle')
  local to = destination(q, tag)
  if to then return free_slot(q, to) end
  local warm = redis.call('HGET', queue_key(q, 'warm'), tag)
  if warm and redis.call('ZSCORE', idle, warm) and not lacks(q, tag, string.match(warm, '^[^:]+')) then
    return warm
  end
  if awaited_slot(q, tag) then return nil end
  local held = holders(q, tag)
  local near = held[1] and string.match(held[1], '^[^:]+')
  if not near and not conf(q).lacking then return redis.call('ZRANGE', idle, 0, 0)[1] end
  local first, lacking = nil, {}
  for _, slot in ipairs(redis.call('ZRANGE', idle, 0, LOOK - 1)) do
    local inc = string.match(slot, '^[^:]+')
    if lacking[inc] == nil then lacking[inc] = lacks(q, tag, inc) or false end
    if not lacking[inc] then
      if not near or inc == near then return slot end
      first = first or slot
    end
  end
  return first
end

-- Dispatch a tag that is off the ring, or put it aside; how many leases that has opened.
local function bring_together(q, tag, place, aside)
  local slot = pick_slot(q, tag)
  if not slot then
    put_aside(aside, tag, place)
    return 0
  end
  local inc, i = string.match(slot, '^([^:]+):(.+)$')
  local w = worker(inc)
  withdraw_idle(inc, i, w or {queues = {q}})
  if not w or not w.active then
    enlist(q, tag, true)
    return 0
  end
  if open_lease(q, tag, inc, i, w) then return 1 end
  offer_idle(inc, i, w)
  return 0
end

-- Behind the tags up to the place `from`, or up to where the last step came: LOOK of them. The bell rings
-- until the end of the ring, or until no slot is free: the next look begins at the start, so that of the
-- tags that fit the first one is.
local function look_on(q, from)
  local look, ring, aside = queue_key(q, 'look'), queue_key(q, 'ring'), {}
  local before = redis.call('HGET', look, 'from')
  if not before then redis.call('HDEL', look, 'anew') end
  if before and tonumber(before) > tonumber(from) then from = before end
  local behind = redis.call('ZRANGEBYSCORE', ring, from, '+inf', 'WITHSCORES', 'LIMIT', 0, LOOK)
  for k = 1, #behind, 2 do
    if redis.call('ZCARD', queue_key(q, 'idle')) == 0 then break end
    redis.call('ZREM', ring, behind[k])
    if is_ready(q, behind[k]) then bring_together(q, behind[k], behind[k + 1], aside) end
  end
  put_back_aside(q, aside)
  if redis.call('ZCARD', queue_key(q, 'idle')) == 0 then
    redis.call('DEL', look)
  elseif #behind == 2 * LOOK then
    redis.call('HSET', look, 'from', behind[#behind])
    ring_bell(q)
  else
    redis.call('HDEL', look, 'from')
    if redis.call('EXISTS', look) == 1 then ring_bell(q) end
  end
end

-- Dispatch ready tags to free slots, at most `budget`; the leader's bell rings if more remain, and
-- unless `noted` (by the leader) if a tag waits for its warm slot: returns ms until it does no more, or
-- nil.
local function match(q, budget, noted)
  local aside, opened, last = {}, 0, nil
  for _ = 1, budget do
    local tag, place
    if redis.call('ZCARD', queue_key(q, 'idle')) > 0 then tag, place = pop_tag(q) end
    if not tag then
      budget = nil
      break
    end
    opened = opened + bring_together(q, tag, place, aside)
    last = place
  end
  put_back_aside(q, aside)
  if budget and #aside > 0 and noted then
    look_on(q, last)
  elseif budget and #aside > 0 then
    leave_look(q)
  elseif noted then
    redis.call('DEL', queue_key(q, 'look'))
  end
  if (budget and opened > 0) or (PATIENCE and not noted) then ring_bell(q) end
  return PATIENCE
end
