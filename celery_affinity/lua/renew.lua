-- renew: prolong a term that is still in force.
--
-- KEYS[1] namespace prefix     ARGV queue, fence, ttl in ms
-- Returns 1 renewed; 0 the term is over
-- @include base
-- @include fence
if not in_term(ARGV[1], ARGV[2]) then return 0 end
redis.call('PEXPIRE', queue_key(ARGV[1], 'leader'), ARGV[3])
return 1
