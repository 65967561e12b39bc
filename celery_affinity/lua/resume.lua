-- resume: end a queue's evacuation or pause; it takes messages in and dispatches again.
--
-- KEYS[1] namespace prefix     ARGV queue
-- Returns 1 (also to a repeat); 0 the stage is not handed over yet: evacuate first
-- @include base
-- @include ring
-- @include deliver
-- @include lease
-- @include match
local q = ARGV[1]
if redis.call('EXISTS', queue_key(q, 'stage')) == 1 then return 0 end
redis.call('HDEL', queue_key(q, 'conf'), 'evac', 'paused')
ring_bell(q)
match(q, 100)
return 1
