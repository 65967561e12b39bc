-- What the leader notes for those who look: how fast the queue is, and which backlogs are long.

-- Once a second at most, and only while something changes: half an hour of it.
local function tend(q)
  local pace, big = queue_key(q, 'pace'), queue_key(q, 'big')
  local last = redis.call('LINDEX', pace, -1)
  local at, rest = string.match(last or '', '^(%d+) (.*)$')
  if at and NOW - at >= 0 and NOW - at < 1000 then return end
  local v = redis.call('HMGET', queue_key(q, 'c'), 'seq', 'leases', 'settled')
  local now = table.concat({v[1] or 0, v[2] or 0, v[3] or 0}, ' ')
  if now ~= rest then
    redis.call('RPUSH', pace, text(NOW) .. ' ' .. now)
    redis.call('LTRIM', pace, -1800, -1)
  end
  -- A few of the marks that backlogs have passed are put right in turn.
  if not conf(q).marks then return end
  local marks = redis.call('ZCARD', big)
  if marks == 0 then return redis.call('HDEL', queue_key(q, 'conf'), 'marks') end
  local from = math.floor(NOW / 1000) * 10 % marks
  for _, tag in ipairs(redis.call('ZRANGE', big, from, from + 9)) do
    local length = redis.call('LLEN', backlog_key(q, tag))
    if length < 16 then redis.call('ZREM', big, tag) else redis.call('ZADD', big, length, tag) end
  end
end
