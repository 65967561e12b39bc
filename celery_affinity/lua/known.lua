-- known: whoever waits for the result of this buried entry knows that there will be none, says the
-- worker that buried it.
--
-- KEYS[1] namespace prefix     ARGV queue, entry
-- Returns 1 noted; 0 it was known already (a repeat)
-- @include base
local noted = redis.call('ZREM', queue_key(ARGV[1], 'telling'), ARGV[2])
  + redis.call('LREM', queue_key(ARGV[1], 'untold'), 1, ARGV[2])
return math.min(noted, 1)
