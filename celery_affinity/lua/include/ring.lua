-- The ready ring and the order inside a backlog.

local function holders(q, tag)
  local slots = {}
  for slot in string.gmatch(redis.call('HGET', queue_key(q, 'held'), tag) or '', '%S+') do
    slots[#slots + 1] = slot
  end
  return slots
end

-- Whether a tag waits for the retry at its head to become due (ordered_retries), or for an
-- operator (on_failure).
local function on_hold(q, tag)
  return (conf(q).ordered > 0 or conf(q).halts) and redis.call('ZSCORE', queue_key(q, 'hold'), tag)
end

local function is_halted(q, tag)
  return conf(q).halts and redis.call('HEXISTS', queue_key(q, 'halted'), tag) == 1
end

-- After the failure of an entry (on_failure), or when it is paused, a tag gets no slot until an
-- operator says so. A retry at its head that is not due keeps its time (later).
local function halt(q, tag, why)
  local c, halted, hold = conf(q), queue_key(q, 'halted'), queue_key(q, 'hold')
  local before = redis.call('HGET', halted, tag)
  redis.call('HSET', halted, tag, before and before .. ' ' .. why or why)
  local due = redis.call('ZSCORE', hold, tag)
  if due and due ~= 'inf' then redis.call('HSET', queue_key(q, 'later'), tag, due) end
  redis.call('ZADD', hold, '+inf', tag)
  redis.call('ZREM', queue_key(q, 'ring'), tag)
  if c.warm_wait > 0 then redis.call('HDEL', queue_key(q, 'since'), tag) end
  redis.call('HSET', queue_key(q, 'conf'), 'halts', '1')
  c.halts = true
end

-- Put a tag into the ring if it has a backlog and room under its concurrency. With more than
-- one lease a tag waits until its last dispatch has started, so that starts keep their order; a lease
-- that was opened when it was the only one may have two out, and says when it has no more (pump).
local function enlist(q, tag, to_front)
  if redis.call('EXISTS', backlog_key(q, tag)) == 0 then
    if conf(q).marks then redis.call('ZREM', queue_key(q, 'big'), tag) end
    return
  end
  if on_hold(q, tag) then return end
  local slots = holders(q, tag)
  if #slots > 0 then
    if #slots >= concurrency(q, tag) then return end
    local inc, i = string.match(slots[1], '^([^:]+):(.+)$')
    if #slots == 1 and redis.call('HGET', slot_key(inc, i), 'cn') == '1' then return end
    if redis.call('SISMEMBER', queue_key(q, 'unst'), tag) == 1 then return end
  end
  local ring = queue_key(q, 'ring')
  if to_front then
    local first = redis.call('ZRANGE', ring, 0, 0, 'WITHSCORES')
    redis.call('ZADD', ring, 'NX', text(tonumber(first[2] or NOW_US) - 1), tag)
  else
    local last = redis.call('ZRANGE', ring, -1, -1, 'WITHSCORES')
    redis.call('ZADD', ring, 'NX', text(math.max(NOW_US, tonumber(last[2] or 0) + 1)), tag)
  end
  if conf(q).warm_wait > 0 then redis.call('HSETNX', queue_key(q, 'since'), tag, text(NOW)) end
end

-- Put an entry back where its number belongs. A backlog grows by number, and before that place
-- stands only what was out too: a few entries, or the calls of batch tasks in other leases of the tag.
local function put_back(q, tag, entry)
  local list = backlog_key(q, tag)
  local number, from, page = tonumber(entry), 0, 2 * concurrency(q, tag) + 1
  repeat
    local some = redis.call('LRANGE', list, from, from + page - 1)
    for _, other in ipairs(some) do
      if tonumber(other) > number then
        redis.call('LINSERT', list, 'BEFORE', other, entry)
        return
      end
    end
    local last = #some < page
    from, page = from + page, 100
  until last
  redis.call('RPUSH', list, entry)
end

local function forget_entry(q, entry)
  redis.call('HDEL', queue_key(q, 'm'), entry)
  redis.call('HDEL', queue_key(q, 'att'), entry)
  if conf(q).ordered > 0 then redis.call('HDEL', queue_key(q, 'retrying'), entry) end
  if is_sampled(entry) then redis.call('HDEL', queue_key(q, 'joined'), entry) end
end

-- For so long a worker is believed to be about to tell of what it has buried (ms).
local TELLING = 30000

local function is_about_to_tell(q, entry)
  redis.call('ZADD', queue_key(q, 'telling'), text(NOW + TELLING), entry)
end

-- To the dead letters; an admitted one (without `message`) halts its tag where on_failure says so.
-- Whoever waits for its result is told by the leader (untold), unless that has been `told`, or the worker
-- that calls is about to ('soon'): then by the leader if the worker does not say in time that it has (known).
local function bury(q, entry, tag, reason, message, told, traceback)
  local meta = {reason = reason, tag = tag, at = NOW, traceback = traceback,
    attempts = tonumber(redis.call('HGET', queue_key(q, 'att'), entry) or 0)}
  if traceback then meta.attempts = meta.attempts + 1 end
  redis.call('ZADD', queue_key(q, 'deadz'), entry, entry)
  redis.call('HSET', queue_key(q, 'dead'), entry, cjson.encode(meta))
  redis.call('HSET', queue_key(q, 'deadm'), entry,
    message or redis.call('HGET', queue_key(q, 'm'), entry) or '')
  forget_entry(q, entry)
  count(q, 'buried')
  if not message and conf(q).failure > 0 then
    halt(q, tag, (conf(q).failure == 1 and 'block:' or 'park:') .. entry)
  end
  if told == 'soon' then
    is_about_to_tell(q, entry)
  elseif not told then
    redis.call('RPUSH', queue_key(q, 'untold'), entry)
    ring_bell(q)
  end
end
