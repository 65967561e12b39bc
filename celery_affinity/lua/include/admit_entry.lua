-- One usable message becomes an entry: due later, or at the end of its tag's backlog.

local function is_power_of_two(n) return math.frexp(n) == 0.5 end

-- The longest backlogs are known by marks that they passed, at no cost for each entry (tend.lua).
local function note_big(q, tag, length)
  local big = queue_key(q, 'big')
  redis.call('ZADD', big, length, tag)
  redis.call('ZREMRANGEBYRANK', big, 0, -1001)
  if not conf(q).marks then redis.call('HSET', queue_key(q, 'conf'), 'marks', '1') end
  conf(q).marks = true
end

local function admit_entry(q, raw, tag, eta)
  local entry = text(redis.call('HINCRBY', queue_key(q, 'c'), 'seq', 1))
  redis.call('HSET', queue_key(q, 'm'), entry, raw)
  if eta and eta > NOW then
    redis.call('ZADD', queue_key(q, 'eta'), text(eta), entry .. ':' .. tag)
  else
    local length = redis.call('RPUSH', backlog_key(q, tag), entry)
    if length >= 16 and is_power_of_two(length) then note_big(q, tag, length) end
  end
  return entry
end

-- A tag that has new work: its own slot takes it at once if it has room, else the ring.
local function awaken(q, tag)
  local held = redis.call('HGET', queue_key(q, 'held'), tag)
  if held and concurrency(q, tag) == 1 then
    if string.find(held, ' ', 1, true) then return end  -- it had more: they end (limit)
    local inc, i = string.match(held, '^([^:]+):(.+)$')
    local w = worker(inc)
    if w and w.active then
      local l = load_lease(inc, i)
      if pump(l, w) > 0 then save_lease(l) end
    end
  else
    enlist(q, tag)
  end
end
