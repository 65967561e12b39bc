-- finish: a running task was given its end by the parent (time limit, terminate); its process
-- is being stopped. The entry settles, but the tag is released only by process_up.
--
-- KEYS[1] namespace prefix
-- ARGV    incarnation, slot, entry, epoch, 'failed' (its time limit) or ''
-- Returns 1 noted; 0 not this caller's (any more); 2 it shared its call with others when the time was
-- over, and nobody knows whose fault that was: all of them go back, and run one by one
-- @include base
local key = slot_key(ARGV[1], ARGV[2])
local v = redis.call('HMGET', key, 'epoch', 'e1', 'k1', 'b')
if v[1] ~= ARGV[4] or v[2] ~= ARGV[3] or not v[3] then return 0 end
if v[4] and ARGV[5] == 'failed' then return 2 end
redis.call('HSET', key, 'fin', ARGV[3] .. (ARGV[5] == 'failed' and ' failed' or ''))
return 1
