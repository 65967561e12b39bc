-- resign: end one's own term at once and wake the other candidates.
--
-- KEYS[1] namespace prefix     ARGV queue, fence
-- Returns 1 resigned; 0 the term was over already
-- @include base
-- @include fence
if not in_term(ARGV[1], ARGV[2]) then return 0 end
redis.call('DEL', queue_key(ARGV[1], 'leader'))
redis.call('LPUSH', queue_key(ARGV[1], 'vacant'), '1')
redis.call('EXPIRE', queue_key(ARGV[1], 'vacant'), 60)
return 1
