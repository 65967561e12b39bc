-- admit: move usable messages from the pending queue into the ledger, in their order.
--
-- KEYS[1]   namespace prefix
-- KEYS[2..] the pending queue's lists, most urgent first; a list's oldest message is at its tail
-- ARGV      queue, fence, how many at most
-- Returns   {-1} not the leader; {-2} the queue is evacuated;
--           {admitted, more, list, raw}: list > 0 names the list (index in KEYS) whose oldest
--           message, raw, Python must look at (resolve.lua) before the next call.
-- Reads and checks each message before it writes; a message it cannot use stays where it is.
-- A repeat (lost reply) admits the next messages, which the caller would ask for anyway.
-- @include base
-- @include fence
-- @include ring
-- @include deliver
-- @include lease
-- @include match
-- @include admit_entry
-- @include read_message
local q, fence, limit = ARGV[1], ARGV[2], tonumber(ARGV[3])
if not in_term(q, fence) then return {-1} end
if conf(q).stopped then return {-2} end

local admitted, tags, order = 0, {}, {}
local stop, stop_raw, more = 0, '', 0
for k = 2, #KEYS do
  local left = limit - admitted
  if left == 0 then more = 1; break end
  local found = redis.call('LRANGE', KEYS[k], -left, -1)
  local read = {}
  for at = #found, 1, -1 do
    local tag, eta = read_message(found[at])
    if not tag then stop, stop_raw = k, found[at]; break end
    read[#read + 1] = {found[at], tag, eta}
  end
  for _, tag in ipairs(admit_entries(q, read)) do
    if not tags[tag] then tags[tag] = true; order[#order + 1] = tag end
  end
  if #read > 0 then redis.call('LTRIM', KEYS[k], 0, -#read - 1) end
  admitted = admitted + #read
  if stop > 0 then break end
  if #read == left then more = 1 end
end
if admitted > 0 then count(q, 'admitted', admitted) end
for _, tag in ipairs(order) do awaken(q, tag) end
match(q, 100)
return {admitted, more, stop, stop_raw}
