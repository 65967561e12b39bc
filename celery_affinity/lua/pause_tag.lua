-- pause_tag: a tag gets no slot until it is resumed (resume_tag); what runs ends.
--
-- KEYS[1] namespace prefix     ARGV queue, tag
-- Returns {1, entries given back that had not started}; {0, 0} it was paused already: nothing changed
-- @include base
-- @include ring
-- @include deliver
-- @include lease
-- @include match
-- @include unstart
local q, tag = ARGV[1], ARGV[2]
local why = redis.call('HGET', queue_key(q, 'halted'), tag)
if why and string.find(' ' .. why .. ' ', ' pause ', 1, true) then return {0, 0} end
halt(q, tag, 'pause')
local back, _, empty = unstart(q, tag)
set_free(empty)
match(q, 10)
return {1, back}
