-- move: a tag's next lease is another worker's; what runs ends where it is.
--
-- KEYS[1] namespace prefix     ARGV queue, tag, incarnation, for how long (ms)
-- Returns {1, entries given back that had not started}; {0, 0} no other worker holds the tag, and that
--         one does; {-1, 0} that worker takes no work of the queue; {-2, moves under way} too many
-- The tag waits for a slot of that worker while others may be free, until that one holds it and no other
-- one does, the time is over or the worker stops; at most 32 do. A repeat changes nothing but the time.
-- @include base
-- @include ring
-- @include deliver
-- @include lease
-- @include match
-- @include unstart
local q, tag, inc, ms = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local moves = queue_key(q, 'moves')
local w = worker(inc)
if not w or not w.active or not w.slots[q] then return {-1, 0} end
local here, elsewhere = false, false
for _, slot in ipairs(holders(q, tag)) do
  if string.match(slot, '^[^:]+') == inc then here = true else elsewhere = true end
end
local flat = redis.call('HGETALL', moves)
for k = 1, #flat, 2 do
  if not destination(q, flat[k]) then redis.call('HDEL', moves, flat[k]) end
end
if here and not elsewhere then
  redis.call('HDEL', moves, tag)
  return {0, 0}
end
local others = redis.call('HLEN', moves) - redis.call('HEXISTS', moves, tag)
if others >= 32 then return {-2, others} end
local back, _, empty = unstart(q, tag, inc)
-- Before the move is noted: where that worker has the tag already it would be over with these leases, and
-- their slots could have the tag again before a free one there.
let_go(empty)
redis.call('HSET', moves, tag, inc .. ' ' .. text(NOW + ms))
redis.call('PEXPIRE', moves, ms)
redis.call('HSET', queue_key(q, 'conf'), 'moving', '1')
conf(q).moving = true
employ(empty)
enlist(q, tag)
match(q, 10)
if destination(q, tag) == inc then
  end_move(q, tag, inc)
  match(q, 10)
end
return {1, back}
