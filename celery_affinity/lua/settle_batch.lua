-- settle_batch: the call of a batch task has ended; all its entries end in one step.
--
-- KEYS[1] namespace prefix
-- ARGV    incarnation, slot, entry that it began with, epoch, start token, then of each entry that it
--         had, in order: entry, outcome, how many words follow, and these: as for settle, behind its outcome
-- Returns as settle; 'stale' too if these are not the entries that the call had.
-- A repeat with the same token gets the same answer.
-- @include base
-- @include ring
-- @include deliver
-- @include lease
-- @include proceed
-- @include match
-- @include unstart
-- @include admit_entry
-- @include go_on
-- @include keep_place
-- @include end_entry
local inc, i, entry, epoch, token = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local l, leased = load_lease(inc, i)
if l.last_token == token then return l.last_answer end
local first = l.out[1]
if not leased or l.epoch ~= epoch or not first or first.entry ~= entry or first.token ~= token then
  return 'stale'
end
local q, had, done, others = l.q, {}, {}, {}
local k = 6
while k <= #ARGV do
  had[#had + 1] = ARGV[k]
  local words = tonumber(ARGV[k + 2])
  if ARGV[k + 1] == 'done' and words == 0 then done[#done + 1] = ARGV[k] else others[#others + 1] = k end
  k = k + 3 + words
end
if table.concat(had, ' ') ~= entry .. (l.mates and ' ' .. l.mates or '') then return 'stale' end

for from = 1, #done, 1000 do
  local to = math.min(from + 999, #done)
  redis.call('HDEL', queue_key(q, 'm'), unpack(done, from, to))
  redis.call('HDEL', queue_key(q, 'att'), unpack(done, from, to))
  if conf(q).ordered > 0 then redis.call('HDEL', queue_key(q, 'retrying'), unpack(done, from, to)) end
end
if #done > 0 then count(q, 'settled', #done) end
for _, at in ipairs(others) do
  local outcome, words = ARGV[at + 1], {unpack(ARGV, at + 3, at + 2 + ARGV[at + 2])}
  local about = outcome == 'failed' and 2 or outcome == 'bury' and 1 or 0
  end_entry(l, ARGV[at], outcome, words[1], words[2], {unpack(words, about + 1)})
end
l.mates = false
redis.call('HDEL', slot_key(inc, i), 'b')
drop_first(l)
local answer = go_on(l, worker(inc))
redis.call('HSET', slot_key(inc, i), 'lt', token, 'lr', answer)
return answer
