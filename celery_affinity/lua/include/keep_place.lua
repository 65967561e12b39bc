-- ordered_retries: a retry keeps its entry, and with it its place at the head of its tag.

-- True if the retry of a running entry of lease l takes the entry's place; its tag waits for it.
-- False if the tag's entries have waited for this one long enough: it goes to the end, as others do.
local function keep_place(l, entry, raw, eta)
  local bound = conf(l.q).ordered
  if bound == 0 then return false end
  local retrying = queue_key(l.q, 'retrying')
  local first = tonumber(redis.call('HGET', retrying, entry) or NOW)
  local due = eta or NOW
  if due - first > bound then return false end
  -- What is out behind it must not start before it.
  if l.out[2] then
    put_back(l.q, l.tag, l.out[2].entry)
    l.out[2] = nil
    l.n = l.n - 1
  end
  redis.call('HSET', queue_key(l.q, 'm'), entry, raw)
  redis.call('HDEL', queue_key(l.q, 'att'), entry)
  redis.call('HSET', retrying, entry, text(first))
  put_back(l.q, l.tag, entry)
  -- Of several retries (of one call, of several leases) none starts before it is due.
  if due > NOW and is_halted(l.q, l.tag) then
    local later = tonumber(redis.call('HGET', queue_key(l.q, 'later'), l.tag) or 0)
    redis.call('HSET', queue_key(l.q, 'later'), l.tag, text(math.max(due, later)))
  elseif due > NOW then
    redis.call('ZADD', queue_key(l.q, 'hold'), 'GT', text(due), l.tag)
  end
  return true
end
