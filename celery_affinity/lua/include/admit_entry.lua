-- One usable message becomes an entry: due later, or at the end of its tag's backlog.

local function admit_entry(q, raw, tag, eta)
  local entry = text(redis.call('HINCRBY', queue_key(q, 'c'), 'seq', 1))
  redis.call('HSET', queue_key(q, 'm'), entry, raw)
  if eta and eta > NOW then
    redis.call('ZADD', queue_key(q, 'eta'), text(eta), entry .. ':' .. tag)
  else
    redis.call('RPUSH', backlog_key(q, tag), entry)
    if is_sampled(entry) then redis.call('HSET', queue_key(q, 'joined'), entry, text(NOW)) end
  end
  return entry
end

-- A tag that has new work: its own slot takes it at once if it has room, else the ring.
local function awaken(q, tag)
  local held = redis.call('HGET', queue_key(q, 'held'), tag)
  if held and concurrency(q, tag) == 1 then
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
