-- claim_run: record that the run of a periodic entry that is due at a moment is the caller's to
-- send, or from which moment on the entry is counted.
--
-- KEYS[1] namespace prefix
-- ARGV    the beats' state, fence, entry,
--         its record as the caller knows it ('' for none), the new record,
--         'send' (a run) | 'begin' (no run: the entry is new, or its schedule has changed)
--         A record is "<due time in us> <mark of its schedule>".
-- Returns -1 not the elected beat; 1 recorded (or recorded already: a repeat after a lost reply);
--         0 refused: the record is another one, or the new due time is not after its
-- A run stays in "unsent" until confirm_run; as long as it does, no other of its entry is claimed.
-- @include base
-- @include fence
local q, name, known, new = ARGV[1], ARGV[3], ARGV[4], ARGV[5]
if not in_term(q, ARGV[2]) then return -1 end
local function due(record) return tonumber(string.match(record, '^%d+') or -1) end
local record = redis.call('HGET', queue_key(q, 'runs'), name) or ''
local unsent = redis.call('HGET', queue_key(q, 'unsent'), name)
local run = ARGV[6] == 'send'
if record == new and (not run or unsent == text(due(new))) then return 1 end
if record ~= known or due(new) <= due(record) or (run and unsent) then return 0 end
redis.call('HSET', queue_key(q, 'runs'), name, new)
if run then redis.call('HSET', queue_key(q, 'unsent'), name, text(due(new))) end
return 1
