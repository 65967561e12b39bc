-- pause: a queue dispatches nothing until it is resumed; it takes messages in, and what runs ends.
--
-- KEYS[1] namespace prefix     ARGV queue, cursor ('0' at first)
-- Returns {cursor, '0' when through (or resumed meanwhile); entries given back that had not started}
-- From the first call on nothing is dispatched; what is out and has not started is given back a page of
-- tags at a time. A repeat finds less to give back.
-- @include base
-- @include ring
-- @include deliver
-- @include lease
-- @include match
-- @include unstart
local q = ARGV[1]
if ARGV[2] == '0' then
  redis.call('HSET', queue_key(q, 'conf'), 'paused', '1')
elseif redis.call('HEXISTS', queue_key(q, 'conf'), 'paused') == 0 then
  return {'0', 0}
end
local page = redis.call('HSCAN', queue_key(q, 'held'), ARGV[2], 'COUNT', 50)
local all = 0
for k = 1, #page[2], 2 do
  local back, _, empty = unstart(q, page[2][k])
  set_free(empty)
  all = all + back
end
return {page[1], all}
