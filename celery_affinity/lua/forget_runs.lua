-- forget_runs: drop the records of periodic entries that are scheduled no more.
--
-- KEYS[1] namespace prefix     ARGV the beats' state, fence, then entry, its record, ...
-- Returns -1 not the elected beat; else how many were dropped: those whose record is that one
-- @include base
-- @include fence
local q, dropped = ARGV[1], 0
if not in_term(q, ARGV[2]) then return -1 end
for k = 3, #ARGV, 2 do
  if redis.call('HGET', queue_key(q, 'runs'), ARGV[k]) == ARGV[k + 1] then
    redis.call('HDEL', queue_key(q, 'runs'), ARGV[k])
    redis.call('HDEL', queue_key(q, 'unsent'), ARGV[k])
    dropped = dropped + 1
  end
end
return dropped
