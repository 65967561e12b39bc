-- promote: what is due moves to the end of its tag's backlog, and free slots get work.
--
-- KEYS[1] namespace prefix
-- ARGV    queue, fence, how many at most
-- Returns {-1} not the leader; {promoted, ms until the next is due or -1}
-- A due entry is numbered anew: it joins the order of its tag now, not when it was sent.
-- @include base
-- @include fence
-- @include ring
-- @include deliver
-- @include lease
-- @include match
-- @include admit_entry
local q, fence, limit = ARGV[1], ARGV[2], tonumber(ARGV[3])
if not in_term(q, fence) then return {-1} end
redis.call('DEL', queue_key(q, 'wake'))
if conf(q).stopped then return {0, -1} end
local eta, messages = queue_key(q, 'eta'), queue_key(q, 'm')
local due = redis.call('ZRANGEBYSCORE', eta, '-inf', text(NOW), 'LIMIT', 0, limit)
for _, member in ipairs(due) do
  local entry, tag = string.match(member, '^(%d+):(.*)$')
  local raw = redis.call('HGET', messages, entry)
  redis.call('ZREM', eta, member)
  if raw then
    forget_entry(q, entry)
    admit_entry(q, raw, tag)
    awaken(q, tag)
  end
end
match(q, 100)
local following = redis.call('ZRANGE', eta, 0, 0, 'WITHSCORES')
if not following[2] then return {#due, -1} end
return {#due, math.max(0, tonumber(following[2]) - NOW)}
