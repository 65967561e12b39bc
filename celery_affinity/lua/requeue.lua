-- requeue: buried messages become work of their tag again, without the failures they had.
--
-- KEYS[1] namespace prefix
-- ARGV    queue, token of this request, a message to admit in place of the buried one ('' as it is;
--         'elsewhere': it was published for another shard, and is only taken out),
--         its tag, its due time in ms or '', then entries (one, if a message is given), oldest first
-- Returns {how many were requeued, then entries whose messages Python must look at: they stay}
-- They join the end of their tag; one that halts its tag (on_failure) goes back to its place at the
-- head, and a tag that was blocked by it goes on. An entry that is not among the dead letters (any
-- more) is passed over: of two callers one moves it. A repeat gets the same answer.
-- @include base
-- @include ring
-- @include deliver
-- @include lease
-- @include match
-- @include admit_entry
-- @include read_message
-- @include dead_letters
local q, token, given = ARGV[1], ARGV[2], ARGV[3]
local before = answered(q, token)
if before then return before end
local done, touched = {0}, {}
for k = 6, #ARGV do
  local entry = ARGV[k]
  local raw = redis.call('HGET', queue_key(q, 'deadm'), entry)
  if raw then
    local tag, eta
    if given ~= '' then
      raw, tag, eta = given, ARGV[4], tonumber(ARGV[5])
    else
      tag, eta = read_message(raw)
    end
    if given == 'elsewhere' then
      take_out(q, entry)
      count(q, 'replayed')
      done[1] = done[1] + 1
    elseif not tag then
      done[#done + 1] = entry
    else
      take_out(q, entry)
      if halts(q, tag, entry) then
        redis.call('HSET', queue_key(q, 'm'), entry, raw)
        put_back(q, tag, entry)
        unblock(q, tag, entry)
      else
        admit_entry(q, raw, tag, eta)
      end
      count(q, 'replayed')
      touched[tag] = true
      done[1] = done[1] + 1
    end
  end
end
for tag in pairs(touched) do awaken(q, tag) end
if done[1] > 0 then
  ring_bell(q)
  match(q, 100)
end
return answer(q, token, done)
