-- How long a sampled entry has waited for its first start, by upper bound (ms). They are those of
-- celery_affinity/measures.py.

local WAITS = {5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000, 30000, 60000, 300000, 1800000}

local function note_wait(q, entry)
  local joined = redis.call('HGET', queue_key(q, 'joined'), entry)
  if not joined then return end  -- it has started before
  redis.call('HDEL', queue_key(q, 'joined'), entry)
  local wait, bound = math.max(0, NOW - tonumber(joined)), 'inf'
  for _, ms in ipairs(WAITS) do
    if wait <= ms then
      bound = ms
      break
    end
  end
  count(q, 'wait:' .. bound)
  count(q, 'wait:sum', text(wait))
end
