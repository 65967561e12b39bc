-- claim: become the leader of a queue if it has none.
--
-- KEYS[1] namespace prefix
-- ARGV    queue, candidate, ttl in ms, schema version
-- Returns {1, term} elected (or elected already: a repeat after a lost reply);
--         {0, ms until the present leader's term can end};
--         {-5, version} the ledger has a layout that this version must not touch
-- The first election in a data set gives it a mark, by which candidates know it again (witness.py).
-- A term's number is above every earlier one, also on an emptied or older data set.
-- @include base
local q, candidate, ttl = ARGV[1], ARGV[2], ARGV[3]
local found = other_schema(ARGV[4])
if found then return {-5, found} end
local leader = queue_key(q, 'leader')
local present = redis.call('GET', leader)
if present then
  local id, term = string.match(present, '^(%S+) (%d+)$')
  if id == candidate then
    redis.call('PEXPIRE', leader, ttl)
    return {1, term}
  end
  return {0, redis.call('PTTL', leader)}
end
local term = grow(q, 'term')
redis.call('HSETNX', queue_key(q, 'c'), 'born', term)
redis.call('SET', leader, candidate .. ' ' .. term, 'PX', ttl)
redis.call('DEL', queue_key(q, 'vacant'))
return {1, term}
