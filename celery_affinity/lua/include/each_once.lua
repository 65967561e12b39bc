-- Messages that were taken off another broker, each once: what carry and set_aside have in common.

-- Puts the messages of ARGV[first] on (identity, 'again' or '', message; oldest first) behind those of a list.
-- Returns how many. Each gets a tombstone; one that may have come before and has one already is left out.
local function each_once(q, list, first, kept_ms, most)
  local carried, done = queue_key(q, 'carried'), 0
  for k = first, #ARGV, 3 do
    local until_ms = redis.call('ZSCORE', carried, ARGV[k])
    redis.call('ZADD', carried, text(NOW + kept_ms), ARGV[k])
    if ARGV[k + 1] == '' or not until_ms or tonumber(until_ms) <= NOW then
      redis.call('LPUSH', list, ARGV[k + 2])
      done = done + 1
    end
  end
  redis.call('ZREMRANGEBYSCORE', carried, '-inf', text(NOW))
  redis.call('ZREMRANGEBYRANK', carried, 0, -most - 1)
  redis.call('PEXPIRE', carried, kept_ms)
  return done
end
