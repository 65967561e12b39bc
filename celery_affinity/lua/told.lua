-- told: whoever waited for the results of these buried entries knows that there will be none.
--
-- KEYS[1] namespace prefix
-- ARGV    queue, fence, an entry that could not be told and goes to the end ('' if none), then
--         the entries that were
-- Returns -1 not the leader; how many were noted (a repeat: 0)
-- @include base
-- @include fence
local q, failed = ARGV[1], ARGV[3]
local untold = queue_key(q, 'untold')
if not in_term(q, ARGV[2]) then return -1 end
local noted = 0
for k = 4, #ARGV do noted = noted + redis.call('LREM', untold, 1, ARGV[k]) end
if redis.call('LREM', untold, 1, failed) == 1 then redis.call('RPUSH', untold, failed) end
return noted
