-- Messages that are admitted once: a timed tombstone for each, at most 50,000 of them.

-- False if a message of that key was admitted within the last hour.
local function first_time(q, key)
  if not key or key == '' then return true end
  local once = queue_key(q, 'once')
  redis.call('ZREMRANGEBYSCORE', once, '-inf', text(NOW))
  local added = redis.call('ZADD', once, 'NX', text(NOW + 3600000), key)
  redis.call('ZREMRANGEBYRANK', once, 0, -50001)
  redis.call('EXPIRE', once, 3600)
  return added == 1
end
