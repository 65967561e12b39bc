-- configure: the leader writes the limits that all scripts read.
--
-- KEYS[1] namespace prefix
-- ARGV    queue, fence, max_batch_size, tag_concurrency, max_deliveries, warm_tags,
--         then tag, concurrency of each tag with a limit of its own
-- Returns -1 not the leader; 1 written
-- @include base
-- @include fence
local q = ARGV[1]
if not in_term(q, ARGV[2]) then return -1 end
redis.call('HSET', queue_key(q, 'conf'), 'max_batch_size', ARGV[3], 'tag_concurrency', ARGV[4],
  'max_deliveries', ARGV[5], 'warm_tags', ARGV[6], 'mapped', #ARGV > 6 and '1' or '0')
if redis.call('EXISTS', P .. 'revoked') == 0 then
  redis.call('HDEL', queue_key(q, 'conf'), 'revoked')
end
redis.call('DEL', queue_key(q, 'limits'))
for k = 7, #ARGV, 2 do redis.call('HSET', queue_key(q, 'limits'), ARGV[k], ARGV[k + 1]) end
return 1
