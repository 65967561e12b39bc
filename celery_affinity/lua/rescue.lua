-- rescue: take out one worker whose heartbeat is overdue.
--
-- KEYS[1] namespace prefix
-- ARGV    queue, fence, how many leases at most (but the last one's tag gives back all that it has there),
--         Redis' clock when the leader looked at it (ms), for how long that look is good (ms), then
--         incarnation and deadline of each worker whose deadline has been the same for long by the
--         leader's own clock: others are not taken out, unless their rescue has begun. (Without a look,
--         as laws call it, whatever is overdue is.)
-- Returns {-1} not the leader; {-2} the look is too old, or the clock has jumped since: look again;
--         {0, ms until the next worker can be overdue, or -1 without workers};
--         {1, node name, incarnation, entries given back, more}
-- @include base
-- @include fence
-- @include ring
-- @include deliver
-- @include lease
-- @include match
-- @include unstart
-- @include forget
local q, fence, budget = ARGV[1], ARGV[2], tonumber(ARGV[3])
if not in_term(q, fence) then return {-1} end
if ARGV[4] and math.abs(NOW - tonumber(ARGV[4])) > tonumber(ARGV[5]) then return {-2} end
local first = redis.call('ZRANGE', P .. 'workers', 0, 0, 'WITHSCORES')
if not first[1] then return {0, -1} end
local wait = tonumber(first[2]) - NOW
if wait > 0 then return {0, wait} end
local inc = first[1]
if ARGV[4] and redis.call('HGET', worker_key(inc, 'info'), 'state') ~= 'leaving' then
  inc = nil
  for k = 6, #ARGV, 2 do
    local due = redis.call('ZSCORE', P .. 'workers', ARGV[k])
    if due == ARGV[k + 1] and tonumber(due) <= NOW then inc = ARGV[k]; break end
  end
end
if not inc then return {0, 0} end
local name = redis.call('HGET', worker_key(inc, 'info'), 'name') or ''
local back, more = forget_worker(inc, budget, true)
return {1, name, inc, back, more and 1 or 0}
