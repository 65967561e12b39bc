-- resume_tag: a tag that is paused or halted (on_failure) goes on with what it has.
--
-- KEYS[1] namespace prefix     ARGV queue, tag
-- Returns 1; 0 it was not halted (any more). A repeat changes nothing.
-- @include base
-- @include ring
-- @include deliver
-- @include lease
-- @include match
-- @include admit_entry
-- @include dead_letters
local q, tag = ARGV[1], ARGV[2]
if redis.call('HEXISTS', queue_key(q, 'halted'), tag) == 0 then return 0 end
unhalt(q, tag)
match(q, 100)
return 1
