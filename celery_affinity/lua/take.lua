-- take: a batch task that has started gets what waits behind it; one call runs them all.
--
-- KEYS[1] namespace prefix
-- ARGV    incarnation, slot, entry, epoch, start token, for how long its lease must last at least
--         (ms), name of the task, most bytes of messages
-- Returns {-1} the entry is not this caller's (any more); {-5} ask again, as for start;
--         {1, entry, message, ...} the next of its tag that may join it, in order; often none
-- What joins counts as started, with the same token, until settle_batch or the loss of the process. A start
-- that was granted (settle) has begun with it.
-- It stops at the first that has to be a call of its own: one of another task, one that was started
-- before (it may be what killed its process), a revoked or expired one (its worker's parent says so to
-- whoever waits); and at max_batch_size entries in a call, or in the lease while another tag waits.
-- Nothing joins where the lease would be sent nothing: its worker stops, the tag or the queue is paused or
-- halted, the tag is on its way to another worker, or has more leases than it may.
-- A repeat with the same token gets the same entries.
-- @include base
-- @include ring
-- @include deliver
-- @include lease
-- @include read_message
-- @include waits
local inc, i, entry, epoch, token, task = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[7]
local l, leased = load_lease(inc, i)
local first = l.out[1]
if not leased or l.epoch ~= epoch or not first or first.entry ~= entry or first.token ~= token then
  return {-1}
end
local due = tonumber(redis.call('ZSCORE', P .. 'workers', inc) or 0)
if due - NOW < tonumber(ARGV[6]) then return {-5} end
local q, tag, c, w = l.q, l.tag, conf(l.q), worker(inc)
local messages, list = queue_key(q, 'm'), backlog_key(q, tag)
local answer = {1}
if l.mates then
  for mate in string.gmatch(l.mates, '%d+') do
    answer[#answer + 1] = mate
    answer[#answer + 1] = redis.call('HGET', messages, mate) or ''
  end
  return answer
end
if not c.batches or not string.find(c.batches, '\n' .. task .. '\n', 1, true) then
  c.batches = (c.batches or '\n') .. task .. '\n'
  redis.call('HSET', queue_key(q, 'conf'), 'batches', c.batches)
end
if not w or not w.active or not serves(w, q, i) or l.cn == 0 or c.still or on_hold(q, tag) or barred(q, tag, inc)
  or (l.cn > 1 and redis.call('SISMEMBER', queue_key(q, 'unst'), tag) == 1)
  or redis.call('HEXISTS', queue_key(q, 'att'), entry) == 1 then return answer end

local second = l.out[2] and l.out[2].entry
local room = c.batch - 1
if room > 0 and others_wait(w, i) then
  room = math.min(room, c.batch - l.n + (second and 1 or 0))
  if c.batch_ms > 0 and NOW - l.opened >= c.batch_ms then room = 0 end
end

-- As kombu and Celery write the beginning of the headers; what differs is parsed.
local usual = '^"lang": "py", "task": "' .. string.gsub(task, '%W', '%%%0')
  .. '", "id": "([%w%-]*)", "shadow": [^,]*, "eta": [^,]*, "expires": null,'
local gone = tonumber(c.revoked and redis.call('HGET', queue_key(q, 'gone'), tag) or 0)
local function joins(mate, raw)
  if tonumber(mate) <= gone then return false end
  if redis.call('HEXISTS', queue_key(q, 'att'), mate) == 1 then return false end
  local _, brace = string.find(raw, '{', 2, true)
  local id = brace and string.match(raw, usual, brace + 1)
  if not id then
    local ok, m = pcall(cjson.decode, raw)
    if not ok or m.headers.task ~= task then return false end
    local expires = m.headers.expires
    if expires and expires ~= cjson.null then
      local last = type(expires) == 'string' and eta_ms(expires)
      if not last or last <= NOW then return false end
    end
    id = m.headers.id
  end
  return not (c.revoked and redis.call('ZSCORE', P .. 'revoked', id))
end

local mates, bytes = {}, 0
local function join(mate)
  local raw = #mates < room and redis.call('HGET', messages, mate)
  if not raw or bytes + #raw > tonumber(ARGV[8]) or not joins(mate, raw) then return false end
  bytes = bytes + #raw
  if is_sampled(mate) then note_wait(q, mate) end
  mates[#mates + 1] = mate
  answer[#answer + 1] = mate
  answer[#answer + 1] = raw
  return true
end

local from_backlog = 0
if not second or join(second) then
  local page
  repeat
    page = redis.call('LRANGE', list, from_backlog, from_backlog + 49)
    local joined = 0
    for _, mate in ipairs(page) do
      if not join(mate) then break end
      joined = joined + 1
    end
    from_backlog = from_backlog + joined
  until joined < 50
end
if #mates == 0 then return answer end
if second then l.out[2] = nil end
if from_backlog > 0 then redis.call('LTRIM', list, from_backlog, -1) end
l.n = l.n + from_backlog
save_lease(l)
redis.call('HSET', slot_key(inc, i), 'b', table.concat(mates, ' '))
return answer
