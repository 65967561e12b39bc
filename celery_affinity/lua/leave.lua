-- leave: a node has stopped and no process of it runs any more; it takes itself out.
--
-- KEYS[1] namespace prefix     ARGV incarnation, how many leases at most (but the last one's tag
--         gives back all that it has there)
-- Returns {given back, more}
-- @include base
-- @include ring
-- @include deliver
-- @include lease
-- @include match
-- @include unstart
-- @include forget
local back, more = forget_worker(ARGV[1], tonumber(ARGV[2]))
return {back, more and 1 or 0}
