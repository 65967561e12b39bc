-- The ready ring and the order inside a backlog.

local function holders(q, tag)
  local slots = {}
  for slot in string.gmatch(redis.call('HGET', queue_key(q, 'held'), tag) or '', '%S+') do
    slots[#slots + 1] = slot
  end
  return slots
end

-- Whether a tag waits for the retry at its head to become due (ordered_retries).
local function on_hold(q, tag)
  return conf(q).ordered > 0 and redis.call('ZSCORE', queue_key(q, 'hold'), tag)
end

-- Put a tag into the ring if it has a backlog and room under its concurrency. With more than
-- one lease a tag waits until its last dispatch has started, so that starts keep their order.
local function enlist(q, tag, to_front)
  if redis.call('EXISTS', backlog_key(q, tag)) == 0 or on_hold(q, tag) then return end
  local held = #holders(q, tag)
  if held > 0 then
    if held >= concurrency(q, tag) then return end
    if redis.call('SISMEMBER', queue_key(q, 'unst'), tag) == 1 then return end
  end
  local ring = queue_key(q, 'ring')
  if to_front then
    local first = redis.call('ZRANGE', ring, 0, 0, 'WITHSCORES')
    local place = tonumber(first[2] or redis.call('HGET', queue_key(q, 'c'), 'ring') or 0)
    redis.call('ZADD', ring, 'NX', text(place - 1), tag)
  else
    redis.call('ZADD', ring, 'NX', redis.call('HINCRBY', queue_key(q, 'c'), 'ring', 1), tag)
  end
  if conf(q).warm_wait > 0 then redis.call('HSETNX', queue_key(q, 'since'), tag, text(NOW)) end
end

-- Put an entry back where its number belongs. A backlog grows by number, and at most
-- tag_concurrency entries can be out, so the place is among the first few.
local function put_back(q, tag, entry)
  local list = backlog_key(q, tag)
  local number = tonumber(entry)
  for _, other in ipairs(redis.call('LRANGE', list, 0, 2 * concurrency(q, tag))) do
    if tonumber(other) > number then
      redis.call('LINSERT', list, 'BEFORE', other, entry)
      return
    end
  end
  redis.call('RPUSH', list, entry)
end

local function forget_entry(q, entry)
  redis.call('HDEL', queue_key(q, 'm'), entry)
  redis.call('HDEL', queue_key(q, 'att'), entry)
  if conf(q).ordered > 0 then redis.call('HDEL', queue_key(q, 'retrying'), entry) end
end

-- To the dead letters. Whoever waits for its result is told by the leader (untold), unless the
-- caller does that itself.
local function bury(q, entry, tag, reason, message, told)
  local meta = {reason = reason, tag = tag, at = NOW,
    attempts = tonumber(redis.call('HGET', queue_key(q, 'att'), entry) or 0)}
  redis.call('HSET', queue_key(q, 'dead'), entry, cjson.encode(meta))
  redis.call('HSET', queue_key(q, 'deadm'), entry,
    message or redis.call('HGET', queue_key(q, 'm'), entry) or '')
  forget_entry(q, entry)
  count(q, 'buried')
  if not told then
    redis.call('RPUSH', queue_key(q, 'untold'), entry)
    ring_bell(q)
  end
end
