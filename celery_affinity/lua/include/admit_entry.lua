-- One usable message becomes an entry: due later, or at the end of its tag's backlog.

-- The longest backlogs are known by marks that they passed (16, 32, 64, ...), at no cost for each entry
-- (tend.lua).
local function note_growth(q, tag, length, by)
  local _, above = math.frexp(length)
  local _, before = math.frexp(length - by)
  if length < 16 or above == before then return end
  local big = queue_key(q, 'big')
  redis.call('ZADD', big, length, tag)
  redis.call('ZREMRANGEBYRANK', big, 0, -1001)
  if not conf(q).marks then redis.call('HSET', queue_key(q, 'conf'), 'marks', '1') end
  conf(q).marks = true
end

local function admit_entry(q, raw, tag, eta)
  local entry = text(redis.call('HINCRBY', queue_key(q, 'c'), 'seq', 1))
  redis.call('HSET', queue_key(q, 'm'), entry, raw)
  if eta and eta > NOW then
    redis.call('ZADD', queue_key(q, 'eta'), text(eta), entry .. ':' .. tag)
  else
    note_growth(q, tag, redis.call('RPUSH', backlog_key(q, tag), entry), 1)
    if is_sampled(entry) then redis.call('HSET', queue_key(q, 'joined'), entry, text(NOW)) end
  end
  return entry
end

-- Lua hands so many values on at once.
local CHUNK = 1000

local function call_in_chunks(name, key, values)
  local answer
  for at = 1, #values, CHUNK do
    answer = redis.call(name, key, unpack(values, at, math.min(at + CHUNK - 1, #values)))
  end
  return answer
end

-- The same of many, each {message, tag, due time or nil}, in their order; their tags in the order in
-- which they come. One command for all of a kind instead of three for each.
local function admit_entries(q, many)
  if #many == 0 then return {} end
  local last = redis.call('HINCRBY', queue_key(q, 'c'), 'seq', #many)
  local messages, due, backlogs, tags, joined = {}, {}, {}, {}, {}
  for k, one in ipairs(many) do
    local entry, tag, eta = text(last - #many + k), one[2], one[3]
    messages[2 * k - 1], messages[2 * k] = entry, one[1]
    if not backlogs[tag] then
      backlogs[tag] = {}
      tags[#tags + 1] = tag
    end
    local list = backlogs[tag]
    if eta and eta > NOW then
      due[#due + 1] = text(eta)
      due[#due + 1] = entry .. ':' .. tag
    else
      list[#list + 1] = entry
      if is_sampled(entry) then
        joined[#joined + 1] = entry
        joined[#joined + 1] = text(NOW)
      end
    end
  end
  call_in_chunks('HSET', queue_key(q, 'm'), messages)
  call_in_chunks('ZADD', queue_key(q, 'eta'), due)
  call_in_chunks('HSET', queue_key(q, 'joined'), joined)
  for _, tag in ipairs(tags) do
    local length = call_in_chunks('RPUSH', backlog_key(q, tag), backlogs[tag])
    if length then note_growth(q, tag, length, #backlogs[tag]) end
  end
  return tags
end

-- A tag that has new work: its own slot takes it at once if it has room, else the ring.
local function awaken(q, tag)
  local held = redis.call('HGET', queue_key(q, 'held'), tag)
  if held and concurrency(q, tag) == 1 then
    if string.find(held, ' ', 1, true) then return end  -- it had more: they end (limit)
    local inc, i = string.match(held, '^([^:]+):(.+)$')
    local w = worker(inc)
    if w and w.active then
      local l = load_lease(inc, i)
      if pump(l, w) > 0 then save_lease(l) end
    end
  else
    enlist(q, tag)
  end
end
