-- purge_tag: delete entries of a tag that wait, the oldest first.
--
-- KEYS[1] namespace prefix
-- ARGV    queue, token of this request, tag, highest entry to delete, how many at most, then entries of the
--         tag that are due later
-- Returns {how many were deleted, 1 if more are to be}. A repeat gets the same answer.
-- What is dispatched and has not started waits, too; what runs ends as it would. A halted tag stays so.
-- @include base
-- @include ring
-- @include deliver
-- @include lease
-- @include match
-- @include admit_entry
-- @include dead_letters
-- @include unstart
local q, token, tag, last, limit = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
local before = answered(q, token)
if before then return before end
local deleted, backlog = 0, backlog_key(q, tag)
local _, _, empty = unstart(q, tag)
local oldest = redis.call('LRANGE', backlog, 0, limit - 1)
for _, entry in ipairs(oldest) do
  if tonumber(entry) > last then break end
  forget_entry(q, entry)
  deleted = deleted + 1
end
local more = deleted == limit and 1 or 0
if deleted > 0 then redis.call('LTRIM', backlog, deleted, -1) end
for k = 6, #ARGV do
  if redis.call('ZREM', queue_key(q, 'eta'), ARGV[k] .. ':' .. tag) == 1 then
    forget_entry(q, ARGV[k])
    deleted = deleted + 1
  end
end
if deleted > 0 then
  count(q, 'purged', deleted)
  redis.call('HDEL', queue_key(q, 'later'), tag)
end
if redis.call('EXISTS', backlog) == 0 then
  redis.call('ZREM', queue_key(q, 'ring'), tag)
  redis.call('ZREM', queue_key(q, 'big'), tag)
  redis.call('HDEL', queue_key(q, 'since'), tag)
  redis.call('HDEL', queue_key(q, 'needs'), tag)
  if not is_halted(q, tag) then redis.call('ZREM', queue_key(q, 'hold'), tag) end
elseif deleted > 0 and not is_halted(q, tag) and redis.call('ZREM', queue_key(q, 'hold'), tag) == 1 then
  awaken(q, tag)  -- the retry that it waited for is gone
end
set_free(empty)
enlist(q, tag)
match(q, 10)
return answer(q, token, {deleted, more})
