-- settle: a started task has ended; in the same step its slot gets what comes next.
--
-- KEYS[1] namespace prefix
-- ARGV    incarnation, slot, entry, epoch, start token,
--         a start token for the next entry ('' if none may be granted), for how long that one must
--         have its lease at least (ms),
--         outcome: 'done' | 'again' (the same message to the end of its tag) | 'bury' (ARGV[9]:
--         reason) | 'failed' (ARGV[9], ARGV[10]: reason, traceback; on_failure says what that means;
--         whoever waits for its result knows), then for each retry: its message, due time in ms
--         or ''
-- Returns 'held' the lease goes on; 'held <entry>' and this one, which was dispatched to the slot before,
--         is started with the second token; 'empty' | 'batch' | 'drained' | 'retry' | 'halted' why
--         the lease was released;
--         'stale' the entry is not this caller's any more, nothing was changed.
-- A repeat with the same token gets the same answer.
-- @include base
-- @include ring
-- @include deliver
-- @include lease
-- @include proceed
local inc, i, entry, epoch, token, outcome = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[8]
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
-- Whether the next entry may be started with this one's end. It was out before, so its message is on its
-- way to this process or waits for it. If it gets lost it counts one start although it may have had
-- none: so only one that this cannot bury (decisions.md).
local function may_grant(o)
  if ARGV[6] == '' or not o or l.out[1] ~= o or not (w and w.active) then return false end
  if conf(q).bury_lost or conf(q).deliveries < 2 then return false end
  -- The process may have the copy that was out before the tag was revoked: without the note.
  local gone = conf(q).revoked and redis.call('HGET', queue_key(q, 'gone'), tag)
  if gone and tonumber(o.entry) <= tonumber(gone) then return false end
  local due = tonumber(redis.call('ZSCORE', P .. 'workers', inc) or 0)
  return due - NOW >= tonumber(ARGV[7]) and redis.call('HEXISTS', queue_key(q, 'att'), o.entry) == 0
end
local plain = outcome == 'done' and not ARGV[9]
if plain then
  forget_entry(q, entry)
  count(q, 'settled')
  drop_first(l)
  local waited = l.out[1]
  if proceed(l, w) then
    l.last_token, l.last_answer = token, 'held'
    if may_grant(waited) then
      waited.token = ARGV[6]
      l.began = NOW
      if is_sampled(waited.entry) then
-- @include waits
        note_wait(q, waited.entry)
      end
      l.last_answer = 'held ' .. waited.entry
    end
    save_lease(l)
    return l.last_answer
  end
end
-- @include match
-- @include unstart
-- @include admit_entry
-- @include go_on
-- @include keep_place
-- @include end_entry
if plain then return answered(pass_on(l, w)) end
local first_retry = outcome == 'failed' and 11 or 9
end_entry(l, entry, outcome, ARGV[9], ARGV[10], outcome == 'bury' and {} or {unpack(ARGV, first_retry)})
drop_first(l)
return answered(go_on(l, w))
