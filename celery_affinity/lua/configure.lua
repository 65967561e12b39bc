-- configure: the leader writes the limits that all scripts read.
--
-- KEYS[1] namespace prefix
-- ARGV    queue, fence, number of limits, then name, value of each (names: include/base.lua, conf),
--         then tag, concurrency of each tag with a limit of its own
-- What an operator set (limit.lua) goes before those.
-- Returns -1 not the leader; 1 written; -2 the queue is spread over another number of shards, and not empty
--         (of dead letters too): its tags would be looked for elsewhere from now on
-- @include base
-- @include fence
local q, own = ARGV[1], 4 + 2 * ARGV[3]
local function pairs_of(flat)
  local found = {}
  for k = 1, #flat, 2 do found[flat[k]] = flat[k + 1] end
  return found
end
if not in_term(q, ARGV[2]) then return -1 end
local limits = pairs_of({unpack(ARGV, 4, own - 1)})
local shards = redis.call('HGET', queue_key(q, 'conf'), 'shards')
if shards and limits.shards and shards ~= limits.shards
  and redis.call('EXISTS', queue_key(q, 'm'), queue_key(q, 'dead'), queue_key(q, 'inbox'), queue_key(q, 'stage'),
    queue_key(q, 'back'), queue_key(q, 'batch')) > 0 then return -2 end
-- Numbers of entries are unique over all shards.
if (limits.first_entry or '0') ~= '0' then
  redis.call('HSETNX', queue_key(q, 'c'), 'seq', limits.first_entry)
end
redis.call('HSET', queue_key(q, 'conf'), 'mapped',
  (#ARGV >= own or redis.call('EXISTS', queue_key(q, 'set')) == 1) and '1' or '0',
  unpack(ARGV, 4, own - 1))
local gone = queue_key(q, 'gone')
for k, last in pairs(pairs_of(redis.call('HGETALL', gone))) do
  local first = redis.call('LINDEX', backlog_key(q, k), 0)
  if not redis.call('HGET', queue_key(q, 'held'), k) and (not first or tonumber(first) > tonumber(last)) then
    redis.call('HDEL', gone, k)
  end
end
if redis.call('EXISTS', P .. 'revoked', gone) == 0 then
  redis.call('HDEL', queue_key(q, 'conf'), 'revoked')
end
if redis.call('EXISTS', queue_key(q, 'needs')) == 0 then
  redis.call('HDEL', queue_key(q, 'conf'), 'lacking')
end
if redis.call('EXISTS', queue_key(q, 'halted')) == 0 then
  redis.call('HDEL', queue_key(q, 'conf'), 'halts')
end
if redis.call('EXISTS', queue_key(q, 'moves')) == 0 then
  redis.call('HDEL', queue_key(q, 'conf'), 'moving')
end
if redis.call('HGET', queue_key(q, 'conf'), 'warm_wait') == '0' then
  redis.call('DEL', queue_key(q, 'since'))
end
redis.call('DEL', queue_key(q, 'limits'))
for k = own, #ARGV, 2 do redis.call('HSET', queue_key(q, 'limits'), ARGV[k], ARGV[k + 1]) end
for tag, n in pairs(pairs_of(redis.call('HGETALL', queue_key(q, 'set')))) do
  redis.call('HSET', queue_key(q, 'limits'), tag, n)
end
return 1
