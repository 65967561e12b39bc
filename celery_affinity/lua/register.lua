-- register: announce an incarnation, then offer its slots to the queues it serves.
--
-- KEYS[1] namespace prefix
-- ARGV    incarnation, node name, messages out per lease, number of slots,
--         queues as lines "queue TAB slots it may use TAB worker queue's list",
--         keys to delete when it is gone (a line each), role, heartbeat timeout in ms,
--         slots that are offered later, a line each: those that still run something, and as "away:<slot>"
--         those that work for another shard; schema version,
--         number of the change (of queues or slots) that this announcement has in it
-- Returns {-5, version} the ledger has a layout that this version must not touch;
--         {1, number of the change that is in force}. A repeat changes nothing but the heartbeat: an
--         offered slot is free or leased. (A later change is told by serve.)
-- While a rescue of it is under way a repeat changes nothing at all, so that the rescue ends.
-- @include base
-- @include ring
-- @include deliver
-- @include lease
-- @include match
local inc = ARGV[1]
local found = other_schema(ARGV[10])
if found then return {-5, found} end
local v = redis.call('HMGET', worker_key(inc, 'info'), 'state', 'change')
if v[1] ~= 'leaving' then redis.call('ZADD', P .. 'workers', text(NOW + ARGV[8]), inc) end
if v[1] then return {1, tonumber(v[2] or 0)} end
redis.call('HSET', worker_key(inc, 'info'), 'name', ARGV[2], 'state', 'active', 'depth', ARGV[3],
  'slots', ARGV[4], 'cap', ARGV[4], 'change', ARGV[11], 'queues', ARGV[5], 'junk', ARGV[6], 'role', ARGV[7], 'timeout', ARGV[8],
  'since', text(NOW))
local held_back = {}
for token in string.gmatch(ARGV[9], '[^\n]+') do
  local i = string.match(token, '%d+$')
  held_back[i] = true
  redis.call('HSET', worker_key(inc, 'busy'), token == i and 'slot:' .. i or token, i)
end
local w = worker(inc)
for i = 0, tonumber(ARGV[4]) - 1 do
  if not held_back[text(i)] then offer_idle(inc, text(i), w) end
end
for _, q in ipairs(w.queues) do match(q, 100) end
return {1, tonumber(ARGV[11])}
