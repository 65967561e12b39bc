-- purge: delete buried messages.
--
-- KEYS[1] namespace prefix     ARGV queue, token of this request, entries
-- Returns {how many were deleted, how many stay because their callers are not told yet}
-- A tag that was blocked by one of them (on_failure) goes on. A repeat gets the same answer.
-- @include base
-- @include ring
-- @include deliver
-- @include lease
-- @include match
-- @include admit_entry
-- @include dead_letters
local q, token = ARGV[1], ARGV[2]
local before = answered(q, token)
if before then return before end
local deleted, left = 0, 0
for k = 3, #ARGV do
  local entry = ARGV[k]
  local meta = redis.call('HGET', queue_key(q, 'dead'), entry)
  if meta and is_untold(q, entry) then
    left = left + 1
  elseif meta then
    take_out(q, entry)
    unblock(q, cjson.decode(meta).tag, entry)
    deleted = deleted + 1
  end
end
match(q, 100)
return answer(q, token, {deleted, left})
