-- revoke: note tasks that must not run, wherever they wait.
--
-- KEYS[1] namespace prefix     ARGV how many queues, the queues, then task ids
-- Returns how many notes there are. A repeat changes nothing but their time.
-- A note is looked at when an entry is dispatched (include/deliver.lua), and kept for 7 days, of the
-- latest 50,000. Queues look for notes only while their conf says that there are any.
-- @include base
local revoked = P .. 'revoked'
local queues = tonumber(ARGV[1])
for k = 2 + queues, #ARGV do redis.call('ZADD', revoked, text(NOW + 604800000), ARGV[k]) end
redis.call('ZREMRANGEBYSCORE', revoked, '-inf', text(NOW))
redis.call('ZREMRANGEBYRANK', revoked, 0, -50001)
redis.call('EXPIRE', revoked, 604800)
for k = 2, 1 + queues do redis.call('HSET', queue_key(ARGV[k], 'conf'), 'revoked', '1') end
return redis.call('ZCARD', revoked)
