-- Taking entries out of the dead letters.

-- The answer that a request with this token got before: its reply was lost.
local function answered(q, token)
  local before = redis.call('GET', queue_key(q, 'done:' .. token))
  return before and cjson.decode(before)
end

local function answer(q, token, value)
  redis.call('SET', queue_key(q, 'done:' .. token), cjson.encode(value), 'EX', 60)
  return value
end

-- Whether the caller of a buried task still waits to be told, by the leader or a worker.
local function is_untold(q, entry)
  return (redis.call('LPOS', queue_key(q, 'untold'), entry)
    or redis.call('ZSCORE', queue_key(q, 'telling'), entry)) and true or false
end

local function take_out(q, entry)
  redis.call('HDEL', queue_key(q, 'dead'), entry)
  redis.call('HDEL', queue_key(q, 'deadm'), entry)
  redis.call('ZREM', queue_key(q, 'deadz'), entry)
  redis.call('LREM', queue_key(q, 'untold'), 1, entry)
  redis.call('ZREM', queue_key(q, 'telling'), entry)
end

-- End a tag's halt; it may have a slot again.
local function unhalt(q, tag)
  local c, later = conf(q), queue_key(q, 'later')
  redis.call('HDEL', queue_key(q, 'halted'), tag)
  if redis.call('EXISTS', queue_key(q, 'halted')) == 0 then
    redis.call('HDEL', queue_key(q, 'conf'), 'halts')
    c.halts = false
  end
  local due = redis.call('HGET', later, tag)
  redis.call('HDEL', later, tag)
  if due and c.ordered > 0 and tonumber(due) > NOW then
    redis.call('ZADD', queue_key(q, 'hold'), due, tag)
    ring_bell(q)
  else
    redis.call('ZREM', queue_key(q, 'hold'), tag)
    awaken(q, tag)
  end
end

-- Whether this entry's failure halts the tag.
local function halts(q, tag, entry)
  local why = redis.call('HGET', queue_key(q, 'halted'), tag)
  return why and string.find(' ' .. why .. ' ', ':' .. entry .. ' ', 1, true) and true or false
end

-- A tag that is blocked by this entry (not one that is parked) need not wait for it any longer.
local function unblock(q, tag, entry)
  local why = redis.call('HGET', queue_key(q, 'halted'), tag)
  if not why then return end
  local rest = {}
  for one in string.gmatch(why, '%S+') do
    if one ~= 'block:' .. entry then rest[#rest + 1] = one end
  end
  if #rest == 0 then
    unhalt(q, tag)
  else
    redis.call('HSET', queue_key(q, 'halted'), tag, table.concat(rest, ' '))
  end
end
