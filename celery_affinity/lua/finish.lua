-- finish: a running task was given its end by the parent (time limit, terminate); its process
-- is being stopped. The entry settles, but the tag is released only by process_up.
--
-- KEYS[1] namespace prefix
-- ARGV    incarnation, slot, entry, epoch, 'failed' (its time limit) or '', with 'failed' its queue
-- Returns 1 noted; 0 it has not started, or is not this caller's (any more): nothing is to be told of it;
--         2 it shared its call with others when the time was over, and nobody knows whose fault that
--         was: all of them go back, and run one by one
-- A 1 for a time limit is given again to a repeat within an hour, also if the slot's next process, or the
-- loss of the worker, has settled the entry meanwhile: whoever waits for its result has to be told.
-- @include base
local key = slot_key(ARGV[1], ARGV[2])
local limit = ARGV[5] == 'failed'
local noted = limit and queue_key(ARGV[6], 'done:limit:' .. ARGV[3] .. ':' .. ARGV[4])
local v = redis.call('HMGET', key, 'epoch', 'e1', 'k1', 'b')
if v[1] ~= ARGV[4] or v[2] ~= ARGV[3] or not v[3] then
  return limit and redis.call('EXISTS', noted) or 0
end
if v[4] and limit then return 2 end
redis.call('HSET', key, 'fin', ARGV[3] .. (limit and ' failed' or ''))
if limit then redis.call('SET', noted, '1', 'EX', 3600) end
return 1
