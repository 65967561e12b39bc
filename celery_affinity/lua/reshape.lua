-- reshape: an empty queue, or shard of one, is to have other tags from now on, or is no more.
--
-- KEYS[1] namespace prefix     ARGV queue, 'goes' if this shard is no more, else ''
-- Returns 1; 0 it is not empty: nothing was changed
-- What operators had set of single tags goes; of a shard that is no more, all but its numbers, which only
-- grow. Needs no fence: there is nothing that could be lost, and a repeat finds nothing.
-- @include base
local q, goes = ARGV[1], ARGV[2] == 'goes'
for _, name in ipairs({'m', 'dead', 'inbox', 'stage', 'back', 'batch'}) do
  if redis.call('EXISTS', queue_key(q, name)) == 1 then return 0 end
end
for _, name in ipairs({'set', 'limits', 'halted', 'hold', 'later', 'gone', 'moves', 'needs', 'warm', 'warmz', 'big'}) do
  redis.call('DEL', queue_key(q, name))
end
redis.call('HDEL', queue_key(q, 'conf'), 'halts', 'moving', 'lacking', 'marks')
if goes then redis.call('DEL', queue_key(q, 'conf'), queue_key(q, 'carried'), queue_key(q, 'pace')) end
return 1
