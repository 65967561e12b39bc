-- find: which message is a task's, a page at a time. Reads only.
--
-- KEYS[1] namespace prefix   KEYS[2] a hash of messages by entry, or a list of them
-- ARGV    the task's id, cursor ('0' at first), how many to look at
-- Returns {cursor, '0' when through; entry, or place in the list from its oldest on (1, 2, ...), or ''}
-- @include base
local id, cursor, count = ARGV[1], ARGV[2], tonumber(ARGV[3])
local plain, dense = '"id": "' .. id .. '"', '"id":"' .. id .. '"'
local function has(raw)
  local at = string.find(raw, id, 1, true)
  return at and (string.find(raw, plain, 1, true) or string.find(raw, dense, 1, true))
end
if redis.call('TYPE', KEYS[2]).ok ~= 'list' then
  local page = redis.call('HSCAN', KEYS[2], cursor, 'COUNT', count)
  for k = 1, #page[2], 2 do
    if has(page[2][k + 1]) then return {'0', page[2][k]} end
  end
  return {page[1], ''}
end
local from = tonumber(cursor)
local page = redis.call('LRANGE', KEYS[2], -from - count, -from - 1)
for at = #page, 1, -1 do
  if has(page[at]) then return {'0', tostring(from + #page - at + 1)} end
end
return {#page < count and '0' or tostring(from + count), ''}
