-- evacuate: stop a queue's dispatch and intake; once nothing is out, move entries to the stage,
-- and when none is left hand the stage over to the pending queue.
--
-- KEYS[1] namespace prefix   KEYS[2] the pending queue's main list
-- ARGV    queue, then entries, oldest first
-- Returns {slots that still hold a tag, entries left, moved, 1 when all is handed over}
-- Consumers of the pending queue see nothing before all is on the stage, so that they cannot take
-- a younger message first. What producers have sent since is younger than all of the ledger's.
-- A repeat, and a second caller, go on where the first one stopped: whoever moves, moves the
-- oldest that are left.
-- @include base
-- @include ring
-- @include read_message
local q, pending = ARGV[1], KEYS[2]
local messages, stage = queue_key(q, 'm'), queue_key(q, 'stage')
redis.call('HSET', queue_key(q, 'conf'), 'evac', '1')
local held = redis.call('HLEN', queue_key(q, 'held'))
if held > 0 then return {held, redis.call('HLEN', messages), 0, 0} end

local moved = 0
for k = 2, #ARGV do
  local entry = ARGV[k]
  local raw = redis.call('HGET', messages, entry)
  if raw then
    local tag = tag_text(header(raw, 'identify_tag'))
    local backlog = backlog_key(q, tag)
    redis.call('LREM', backlog, 1, entry)
    redis.call('ZREM', queue_key(q, 'eta'), entry .. ':' .. tag)
    if redis.call('EXISTS', backlog) == 0 then
      redis.call('ZREM', queue_key(q, 'ring'), tag)
      redis.call('ZREM', queue_key(q, 'hold'), tag)
      redis.call('HDEL', queue_key(q, 'halted'), tag)
      redis.call('HDEL', queue_key(q, 'later'), tag)
      redis.call('HDEL', queue_key(q, 'since'), tag)
    end
    redis.call('LPUSH', stage, raw)
    forget_entry(q, entry)
    moved = moved + 1
  end
end
count(q, 'evacuated', moved)
local left = redis.call('HLEN', messages)
if left > 0 then return {0, left, moved, 0} end

for _ = 1, 1000 do
  local raw = redis.call('RPOP', pending)
  if not raw then break end
  redis.call('LPUSH', stage, raw)
end
if redis.call('EXISTS', pending) == 1 then return {0, 0, moved, 0} end
if redis.call('EXISTS', stage) == 1 then redis.call('RENAME', stage, pending) end
return {0, 0, moved, 1}
