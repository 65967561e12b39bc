-- configure: the leader writes the limits that all scripts read.
--
-- KEYS[1] namespace prefix
-- ARGV    queue, fence, number of limits, then name, value of each (names: include/base.lua, conf),
--         then tag, concurrency of each tag with a limit of its own
-- Returns -1 not the leader; 1 written
-- @include base
-- @include fence
local q, own = ARGV[1], 4 + 2 * ARGV[3]
if not in_term(q, ARGV[2]) then return -1 end
redis.call('HSET', queue_key(q, 'conf'), 'mapped', #ARGV >= own and '1' or '0',
  unpack(ARGV, 4, own - 1))
if redis.call('EXISTS', P .. 'revoked') == 0 then
  redis.call('HDEL', queue_key(q, 'conf'), 'revoked')
end
if redis.call('EXISTS', queue_key(q, 'needs')) == 0 then
  redis.call('HDEL', queue_key(q, 'conf'), 'lacking')
end
if redis.call('HGET', queue_key(q, 'conf'), 'warm_wait') == '0' then
  redis.call('DEL', queue_key(q, 'since'))
end
redis.call('DEL', queue_key(q, 'limits'))
for k = own, #ARGV, 2 do redis.call('HSET', queue_key(q, 'limits'), ARGV[k], ARGV[k + 1]) end
return 1
