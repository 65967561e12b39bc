-- The leader's fence: true while the term that ARGV[2] names is the one in force.
local function in_term(q, fence)
  return redis.call('GET', queue_key(q, 'leader')) == fence
end
