-- limit: a tag's own concurrency, or back to what is declared for it.
--
-- KEYS[1] namespace prefix
-- ARGV    queue, tag, concurrency, 'set' (by an operator) | 'mapped' (declared for this tag) | 'default'
-- Returns {1, slots that hold the tag}; {-1, how many tags are limited} no more than 1,000 may be
-- Lowered: what runs ends, and the tag gets no slot before fewer hold it than may. Raised from one: what
-- waits unstarted in its slot goes back first, since others may start now. A repeat changes nothing.
-- @include base
-- @include ring
-- @include deliver
-- @include lease
-- @include match
-- @include unstart
local q, tag, n, how = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local set, limits = queue_key(q, 'set'), queue_key(q, 'limits')
if how == 'set' then
  local others = redis.call('HLEN', set) - redis.call('HEXISTS', set, tag)
  if others >= 1000 then return {-1, others} end
  redis.call('HSET', set, tag, ARGV[3])
else
  redis.call('HDEL', set, tag)
end
if how == 'default' then
  redis.call('HDEL', limits, tag)
else
  redis.call('HSET', limits, tag, ARGV[3])
end
conf(q).mapped = redis.call('EXISTS', limits) == 1
redis.call('HSET', queue_key(q, 'conf'), 'mapped', conf(q).mapped and '1' or '0')

local slots, same = holders(q, tag), true
for _, slot in ipairs(slots) do
  local inc, i = string.match(slot, '^([^:]+):(.+)$')
  if redis.call('HGET', slot_key(inc, i), 'cn') ~= ARGV[3] then same = false end
end
if #slots > 0 and not same then
  local _, running, empty = unstart(q, tag)
  for _, l in ipairs(running) do
    -- A start that is only granted may be declined: nothing behind it may start before that.
    local waits = l.cn == 1 and n > 1 and is_granted(l, l.out[1])
    l.cn = waits and 1 or #running > n and 0 or n
    redis.call('HSET', slot_key(l.inc, l.i), 'cn', l.cn)
  end
  set_free(empty)
end
enlist(q, tag)
match(q, 10)
return {1, #holders(q, tag)}
