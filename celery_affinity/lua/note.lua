-- note: what an operator asks for, before it is done.
--
-- KEYS[1] namespace prefix     ARGV token of this request, JSON of it, without the time and its end brace
-- Returns 1; 0 to a repeat. The latest 200 are kept.
-- @include base
local changes = P .. 'changes'
for _, one in ipairs(redis.call('LRANGE', changes, 0, 20)) do
  if string.find(one, ARGV[1], 1, true) then return 0 end
end
redis.call('LPUSH', changes, ARGV[2] .. ', "token": "' .. ARGV[1] .. '", "at": ' .. text(NOW) .. '}')
redis.call('LTRIM', changes, 0, 199)
return 1
