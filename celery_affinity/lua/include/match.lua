-- Bring free slots and ready tags together.

-- Tags and slots that one step looks at to find a pair that fits.
local LOOK = 64
-- While more tags than the leader's pass looks at may not have any free slot: ms until its next pass
-- looks on behind them, and from the end of the ring until it begins anew.
local STEP, REST = 50, 500

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

local function pop(ring, behind)
  if not behind then return redis.call('ZPOPMIN', ring) end
  local found = redis.call('ZRANGEBYSCORE', ring, '(' .. behind, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
  if found[1] then redis.call('ZREM', ring, found[1]) end
  return found
end

-- Take the first tag (behind a place) with a backlog and room off the ring; its place, to put it back.
-- (One whose limit was lowered since may have no room; the release of a slot that holds it brings it back.)
local function pop_tag(q, behind)
  if conf(q).still then return nil end
  for _ = 1, LOOK do
    local popped = pop(queue_key(q, 'ring'), behind)
    if not popped[1] then return nil end
    local room = #holders(q, popped[1]) < concurrency(q, popped[1])
    if room and redis.call('EXISTS', backlog_key(q, popped[1])) == 1 then return popped[1], popped[2] end
    if conf(q).warm_wait > 0 then redis.call('HDEL', queue_key(q, 'since'), popped[1]) end
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

-- The first tag of the ring (behind a place) that may go to this slot, of LOOK; the place of the last
-- one that may not, and whether the ring has no more.
local function look(q, inc, i, behind)
  local aside, found, seen_all = {}, nil, false
  for _ = 1, LOOK do
    local tag, place = pop_tag(q, behind)
    if not tag then
      seen_all = true
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
  return found, aside[#aside - 1], seen_all
end

-- The tag whose lease has just ended in the slot that looks for work, and its queue (pass_on).
local LEFT = nil
-- Queues with tags that a slot which found nothing has not looked at.
local UNSEEN = {}

-- The first tag of the ring that may go to this slot. Behind LOOK that may not, LOOK more are looked at,
-- each time those that follow (passed), so that none waits for ever behind them; and as long as none of
-- these may, the slot's own last one goes on.
local function next_tag(q, inc, i)
  local found, to, seen_all = look(q, inc, i)
  if found or seen_all then return found end
  local c, config = conf(q), queue_key(q, 'conf')
  local from = c.passed and tonumber(c.passed) > tonumber(to) and c.passed or to
  found, to, seen_all = look(q, inc, i, from)
  c.passed = not found and not seen_all and to
  if c.passed then redis.call('HSET', config, 'passed', to) else redis.call('HDEL', config, 'passed') end
  if not found and LEFT and LEFT.q == q and not barred(q, LEFT.tag, inc)
    and redis.call('ZREM', queue_key(q, 'ring'), LEFT.tag) == 1 then return LEFT.tag end
  if not found then UNSEEN[#UNSEEN + 1] = q end
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
    if tag and open_lease(q, tag, inc, i, w) then
      UNSEEN = {}
      return
    end
  end
  offer_idle(inc, i, w)
  for _, q in ipairs(UNSEEN) do ring_bell(q) end
  UNSEEN = {}
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
  local first, task = nil, needed(q, tag)
  for _, slot in ipairs(redis.call('ZRANGE', idle, 0, LOOK - 1)) do
    local inc = string.match(slot, '^[^:]+')
    if not (task and lacks_task(inc, task)) then
      if not near or inc == near then return slot end
      first = first or slot
    end
  end
  return first
end

-- Note how far a pass of the leader came (`to`: it has looked at as many tags as it may), so that the
-- next one looks on there: no slot stays free behind tags that it may not have. By itself such a look
-- ends when no slot is free, or when one pass has seen the whole ring from its start.
local function note_look(q, from, to)
  local config = queue_key(q, 'conf')
  if not to and from and from ~= '0' and redis.call('ZCARD', queue_key(q, 'idle')) > 0 then to = '0' end
  if to then
    redis.call('HSET', config, 'looked', to)
    local wait = to == '0' and REST or STEP
    PATIENCE = math.min(PATIENCE or wait, wait)
  elseif from then
    redis.call('HDEL', config, 'looked')
  end
end

-- Dispatch ready tags to free slots, at most `budget`; the leader's bell rings if more remain, and
-- unless `noted` (in the leader's pass) if a tag waits for its warm slot: returns ms until it does no
-- more, or nil.
local function match(q, budget, noted)
  local aside, opened = {}, 0
  local from = noted and conf(q).looked
  for _ = 1, budget do
    local tag, place
    if redis.call('ZCARD', queue_key(q, 'idle')) > 0 then tag, place = pop_tag(q, from) end
    if not tag then
      budget = nil
      break
    end
    local slot = pick_slot(q, tag)
    if slot then
      local inc, i = string.match(slot, '^([^:]+):(.+)$')
      local w = worker(inc)
      withdraw_idle(inc, i, w or {queues = {q}})
      if w and w.active then
        if open_lease(q, tag, inc, i, w) then opened = opened + 1 else offer_idle(inc, i, w) end
      else
        enlist(q, tag, true)
      end
    else
      put_aside(aside, tag, place)
    end
  end
  put_back_aside(q, aside)
  if noted then note_look(q, from, budget and aside[#aside - 1]) end
  if (budget and opened > 0) or (PATIENCE and not noted) then ring_bell(q) end
  return PATIENCE
end
