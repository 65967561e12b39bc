-- promote: what is due moves to the end of its tag's backlog, tags whose ordered retry is due go
-- back to the ring, and free slots get work. Burials that no worker has told of in time are the leader's.
--
-- KEYS[1] namespace prefix
-- ARGV    queue, fence, how many at most
-- Returns {-1} not the leader; {promoted, ms until there is more to do or -1, buried entries whose
--         callers are to be told (told.lua)}
-- A due entry is numbered anew: it joins the order of its tag now, not when it was sent.
-- @include base
-- @include fence
-- @include ring
-- @include deliver
-- @include lease
-- @include match
-- @include admit_entry
-- @include tend

-- A tag that waits for a worker that may know its task, and none is left: it goes to any, which ends it.
-- At most ten tasks are asked for, from where the last pass stopped.
local function forget_needs(q)
  local needs, config = queue_key(q, 'needs'), queue_key(q, 'conf')
  local page = redis.call('HSCAN', needs, redis.call('HGET', config, 'lacking'), 'COUNT', 10)
  redis.call('HSET', config, 'lacking', page[1])
  local asked, hopeless = 0, {}
  for k = 1, #page[2], 2 do
    local tag, task = page[2][k], page[2][k + 1]
    if hopeless[task] == nil then
      if asked == 10 then break end
      asked = asked + 1
      hopeless[task] = not may_be_known(q, task)
    end
    if hopeless[task] then redis.call('HDEL', needs, tag) end
  end
end

local q, fence, limit = ARGV[1], ARGV[2], tonumber(ARGV[3])
if not in_term(q, fence) then return {-1} end
redis.call('DEL', queue_key(q, 'wake'))
-- What a worker was about to tell of, and has not said that it did.
local telling = queue_key(q, 'telling')
for _, entry in ipairs(redis.call('ZRANGEBYSCORE', telling, '-inf', text(NOW), 'LIMIT', 0, limit)) do
  redis.call('ZREM', telling, entry)
  redis.call('RPUSH', queue_key(q, 'untold'), entry)
end
local untold = redis.call('LLEN', queue_key(q, 'untold'))
tend(q)
if conf(q).stopped then return {0, -1, untold} end
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
-- Also where retries are not ordered any more: one that was put on hold before goes on when it is due.
local hold = queue_key(q, 'hold')
for _, tag in ipairs(redis.call('ZRANGEBYSCORE', hold, '-inf', text(NOW), 'LIMIT', 0, limit)) do
  redis.call('ZREM', hold, tag)
  enlist(q, tag)
end
if conf(q).lacking then forget_needs(q) end
local soonest = match(q, 100, true)
for _, key in ipairs({eta, hold}) do
  local following = redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')
  if following[2] and following[2] ~= 'inf' then  -- a halted tag waits for an operator
    local left = math.max(0, tonumber(following[2]) - NOW)
    soonest = math.min(soonest or left, left)
  end
end
return {#due, soonest or -1, untold}
