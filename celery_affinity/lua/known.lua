-- known: whoever waits for the result of this buried entry knows that there will be none, says the
-- worker that buried it.
--
-- KEYS[1] namespace prefix     ARGV queue, entry
-- Returns 1 noted; 0 it was known already (a repeat)
-- @include base
local telling, untold, entry = queue_key(ARGV[1], 'telling'), queue_key(ARGV[1], 'untold'), ARGV[2]
if not redis.call('ZSCORE', telling, entry) and not redis.call('LPOS', untold, entry) then return 0 end
redis.call('ZREM', telling, entry)
redis.call('LREM', untold, 1, entry)
return 1
