-- revoke_tag: no entry that a tag has now will run; each is told as revoked when its turn comes.
--
-- KEYS[1] namespace prefix     ARGV queue, tag
-- Returns {1, entries that wait, then entries that are out}; {-1, tags} no more than 1,000 may be revoked
-- at a time. What is dispatched and has not started goes back, to go out again with the note; what runs is
-- left alone. (Entries that are due later get new numbers: the caller revokes them by their tasks' ids.)
-- @include base
-- @include ring
-- @include deliver
-- @include lease
-- @include match
-- @include unstart
local q, tag = ARGV[1], ARGV[2]
local gone = queue_key(q, 'gone')
local others = redis.call('HLEN', gone) - redis.call('HEXISTS', gone, tag)
if others >= 1000 then return {-1, others} end
redis.call('HSET', gone, tag, redis.call('HGET', queue_key(q, 'c'), 'seq') or '0')
redis.call('EXPIRE', gone, 604800)
redis.call('HSET', queue_key(q, 'conf'), 'revoked', '1')
conf(q).revoked = true
local _, running, empty = unstart(q, tag)
local answer = {1, redis.call('LLEN', backlog_key(q, tag))}
for _, l in ipairs(running) do
  answer[#answer + 1] = l.out[1].entry
  for mate in string.gmatch(l.mates or '', '%d+') do answer[#answer + 1] = mate end
end
for _, l in ipairs(running) do
  local w = worker(l.inc)
  if w and w.active and pump(l, w) > 0 then save_lease(l) end
end
set_free(empty)
enlist(q, tag)
match(q, 10)
return answer
