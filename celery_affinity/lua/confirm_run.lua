-- confirm_run: a claimed run of a periodic entry was published (or given up).
--
-- KEYS[1] namespace prefix     ARGV the beats' state, entry, due time in us
-- Returns 1 noted; 0 nothing of that due time is unsent (a repeat)
-- Fenced by (entry, due), not by the term: that this very run was published stays true when the
-- term is over, and noted it is not published twice.
-- @include base
local unsent = queue_key(ARGV[1], 'unsent')
if redis.call('HGET', unsent, ARGV[2]) ~= ARGV[3] then return 0 end
redis.call('HDEL', unsent, ARGV[2])
return 1
