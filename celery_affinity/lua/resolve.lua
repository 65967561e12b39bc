-- resolve: admit (in a shape that can be stamped) or bury the one message admit stopped at.
--
-- KEYS[1] namespace prefix   KEYS[2] the pending list
-- ARGV    queue, fence, raw (as found), 'admit' | 'bury' | 'drop' (a stray copy of an entry),
--         admit: the message to keep, tag, due time in ms or '', and of one that is admitted
--         once its key (a repeat is dropped); bury: reason, tag or ''
-- Returns -1 not the leader; 0 the oldest message is another one by now, or the queue is evacuated;
--         1 done
-- @include base
-- @include fence
-- @include ring
-- @include deliver
-- @include lease
-- @include match
-- @include admit_entry
-- @include first_time
local q, fence, raw, verdict = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
if not in_term(q, fence) then return -1 end
if conf(q).stopped or redis.call('LINDEX', KEYS[2], -1) ~= raw then return 0 end
redis.call('RPOP', KEYS[2])
if verdict == 'admit' and not first_time(q, ARGV[8]) then verdict = 'drop' end
if verdict == 'admit' then
  admit_entry(q, ARGV[5], ARGV[6], tonumber(ARGV[7]))
  count(q, 'admitted')
  awaken(q, ARGV[6])
  match(q, 100)
elseif verdict == 'drop' then
  count(q, 'strays')
else
  local entry = text(redis.call('HINCRBY', queue_key(q, 'c'), 'seq', 1))
  bury(q, entry, ARGV[6], ARGV[5], raw)
end
return 1
