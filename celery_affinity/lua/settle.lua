-- settle: a started task has ended; in the same step its slot gets what comes next.
--
-- KEYS[1] namespace prefix
-- ARGV    incarnation, slot, entry, epoch, start token,
--         outcome: 'done' | 'again' (the same message to the end of its tag) | 'bury' (ARGV[7]:
--         reason) | 'failed' (ARGV[7], ARGV[8]: reason, traceback; on_failure says what that means;
--         whoever waits for its result knows), then for each retry: its message, due time in ms
--         or ''
-- Returns 'held' the lease goes on; 'empty' | 'batch' | 'drained' | 'retry' | 'halted' why it was
--         released;
--         'stale' the entry is not this caller's any more, nothing was changed.
-- A repeat with the same token gets the same answer.
-- @include base
-- @include ring
-- @include deliver
-- @include lease
-- @include proceed
local inc, i, entry, epoch, token, outcome = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local l, leased = load_lease(inc, i)
if l.last_token == token then return l.last_answer end
local first = l.out[1]
if not leased or l.epoch ~= epoch or not first or first.entry ~= entry or first.token ~= token then
  return 'stale'
end
local q, tag = l.q, l.tag
local w = worker(inc)
local function answered(answer)
  redis.call('HSET', slot_key(inc, i), 'lt', token, 'lr', answer)
  return answer
end
local plain = outcome == 'done' and not ARGV[7]
if plain then
  forget_entry(q, entry)
  count(q, 'settled')
  drop_first(l)
  if proceed(l, w) then return answered('held') end
end
-- @include match
-- @include admit_entry
-- @include go_on
-- @include keep_place
-- @include end_entry
if plain then return answered(pass_on(l, w)) end
local first_retry = outcome == 'failed' and 9 or 7
end_entry(l, entry, outcome, ARGV[7], ARGV[8], outcome == 'bury' and {} or {unpack(ARGV, first_retry)})
drop_first(l)
return answered(go_on(l, w))
