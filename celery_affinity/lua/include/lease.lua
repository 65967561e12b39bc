-- A slot's lease: open, fill with messages, release, take back.

local FIELDS = {'q', 'tag', 'epoch', 'n', 'cn', 'x', 't', 'miss', 'fin',
  'e1', 's1', 'p1', 'k1', 'e2', 's2', 'p2', 'o', 'b', 'lt', 'lr'}

-- Whether a settle has granted this start: its process knows of it, but may not have begun with it. Such
-- a token ends in "?". Whatever it is not safe to take for unstarted takes it for started. One that its
-- node has given its end (finish) has begun, and so has one that mates have joined (take).
local function was_granted(o) return o.token and string.sub(o.token, -1) == '?' end
local function is_granted(l, o)
  return was_granted(o) and not l.mates
    and not (l.fin and string.match(l.fin, '^%d+') == o.entry)
end

-- The lease of a slot, and whether it has one. `mates`: the entries that the call of a batch task
-- which runs there got with its first one, in order, or false; they have its start token.
local function load_lease(inc, i)
  local v = redis.call('HMGET', slot_key(inc, i), unpack(FIELDS))
  local l = {inc = inc, i = i, q = v[1], tag = v[2], epoch = v[3], n = tonumber(v[4]),
    cn = tonumber(v[5]), x = tonumber(v[6]), t = tonumber(v[7]), miss = tonumber(v[8] or 0),
    fin = v[9], out = {}, opened = tonumber(v[17]), mates = v[18],
    last_token = v[19], last_answer = v[20]}
  if v[10] then l.out[1] = {entry = v[10], send = v[11], place = v[12], token = v[13]} end
  if v[14] then l.out[2] = {entry = v[14], send = v[15], place = v[16]} end
  return l, l.q and true or false
end

local function save_lease(l)
  local key = slot_key(l.inc, l.i)
  local set = {'n', l.n, 'x', l.x, 't', text(l.t), 'miss', l.miss}
  if l.last_token then
    for name, v in pairs({lt = l.last_token, lr = l.last_answer}) do
      set[#set + 1] = name
      set[#set + 1] = v
    end
  end
  if l.began then set[#set + 1] = 'began'; set[#set + 1] = text(l.began) end
  local gone = {}
  for k = 1, 2 do
    local o = l.out[k]
    if o then
      for name, v in pairs({e = o.entry, s = o.send, p = o.place}) do
        set[#set + 1] = name .. k
        set[#set + 1] = v
      end
    else
      for _, name in ipairs({'e', 's', 'p'}) do gone[#gone + 1] = name .. k end
    end
  end
  local token = l.out[1] and l.out[1].token
  if token then set[#set + 1] = 'k1'; set[#set + 1] = token else gone[#gone + 1] = 'k1' end
  redis.call('HSET', key, unpack(set))
  if #gone > 0 then redis.call('HDEL', key, unpack(gone)) end
end

-- Whether a tag waits that this slot may serve.
local function others_wait(w, i)
  for _, q in ipairs(w.queues) do
    if serves(w, q, i) and redis.call('ZCARD', queue_key(q, 'ring')) > 0 and not conf(q).still then
      return true
    end
  end
  return false
end

-- Whether a lease has had its share: max_batch_size tasks, or max_batch_seconds.
local function is_full(l)
  local c = conf(l.q)
  return l.n >= c.batch or (c.batch_ms > 0 and NOW - l.opened >= c.batch_ms)
end

-- Whether the lease's slot is to go to another shard (slot_exchange.py).
local function is_lent(l)
  return conf(l.q).sharded and redis.call('HEXISTS', worker_key(l.inc, 'busy'), 'away:' .. l.i) == 1
end

-- The task that a tag waits for a worker to know, or nil.
local function needed(q, tag)
  return conf(q).lacking and redis.call('HGET', queue_key(q, 'needs'), tag) or nil
end

-- Whether a worker turned out not to know a task. Each pair is asked for once (discard, which notes one,
-- asks later).
local KNOWN_LACKS = {}
local function lacks_task(inc, task)
  local pair = inc .. ' ' .. task
  if KNOWN_LACKS[pair] == nil then
    KNOWN_LACKS[pair] = redis.call('SISMEMBER', worker_key(inc, 'lacks'), task) == 1
  end
  return KNOWN_LACKS[pair]
end

local function lacks(q, tag, inc)
  local task = needed(q, tag)
  return task and lacks_task(inc, task)
end

-- Whether what the lease has out is a task known to take what waits behind it (take.lua): a second
-- message sent after it would only be refused.
local function takes_more(l)
  local names = conf(l.q).batches
  if not names then return false end
  local raw = redis.call('HGET', queue_key(l.q, 'm'), l.out[1].entry) or ''
  local task = string.match(raw, '"task": "([^"]*)"')
  return task and string.find(names, '\n' .. task .. '\n', 1, true)
end

-- Whether a worker of the queue is not known to lack the task. (Looks at 1,000 workers at most.)
local function may_be_known(q, task)
  for _, inc in ipairs(redis.call('ZRANGE', P .. 'workers', 0, 999)) do
    local w = worker(inc)
    if w and w.active and w.slots[q] and not lacks_task(inc, task) then return true end
  end
  return false
end

-- The worker that an operator has sent the tag to (move), or nil: it went there, or cannot.
local function destination(q, tag)
  local mark = conf(q).moving and redis.call('HGET', queue_key(q, 'moves'), tag)
  if not mark then return nil end
  local inc, ends = string.match(mark, '^(%S+) (%d+)$')
  local w = tonumber(ends) > NOW and worker(inc)
  if not w or not w.active or not w.slots[q] or lacks(q, tag, inc) then return nil end
  return inc
end

-- Whether a worker may not have this tag now.
local function barred(q, tag, inc)
  if lacks(q, tag, inc) then return true end
  local to = destination(q, tag)
  return to ~= nil and to ~= inc
end

-- A move is over when its worker has the tag and no other one has.
local function end_move(q, tag, inc)
  local slots = holders(q, tag)
  if not slots[1] or destination(q, tag) ~= inc then return end
  for _, slot in ipairs(slots) do
    if string.match(slot, '^[^:]+') ~= inc then return end
  end
  redis.call('HDEL', queue_key(q, 'moves'), tag)
  if redis.call('EXISTS', queue_key(q, 'moves')) == 0 then
    redis.call('HDEL', queue_key(q, 'conf'), 'moving')
    conf(q).moving = false
  end
end

-- Whether the lease may go on under the limit that is configured now, which may be another one than
-- when it was opened. Raised: it lets what it has out end, then has one out as all do. Lowered: those
-- that end first go.
local function keep_to_limit(l)
  local now = concurrency(l.q, l.tag)
  if now == l.cn then return true end
  if now < l.cn and #holders(l.q, l.tag) > now then return false end
  if #l.out == 0 then
    l.cn = now
    redis.call('HSET', slot_key(l.inc, l.i), 'cn', now)
  else
    l.depth = 1
  end
  return true
end

-- Dispatch entries of the lease's tag until it has its share out: two where the slot is a process,
-- one else, for a tag with several leases and behind a batch task. Past its share only while no other
-- tag, and no other shard, waits. A lease of more than the tag may have now (limit; its cn is 0) gets nothing.
local function pump(l, w)
  if conf(l.q).still or l.cn == 0 or not serves(w, l.q, l.i) then return 0 end
  if on_hold(l.q, l.tag) or barred(l.q, l.tag, l.inc) or not keep_to_limit(l) then return 0 end
  local depth = l.depth or (l.cn > 1 and 1 or w.depth)
  local sent = 0
  while #l.out < depth do
    if is_full(l) and (others_wait(w, l.i) or is_lent(l)) then break end
    if l.out[1] and takes_more(l) then break end
    if l.cn > 1 and redis.call('SISMEMBER', queue_key(l.q, 'unst'), l.tag) == 1 then break end
    local entry = redis.call('LPOP', backlog_key(l.q, l.tag))
    if not entry then break end
    l.n = l.n + 1
    l.x = l.x + 1
    l.t = NOW
    l.out[#l.out + 1] = {entry = entry, send = text(l.x), place = text(l.n)}
    if deliver(l, #l.out, w) then
      if l.cn > 1 then
        redis.call('SADD', queue_key(l.q, 'unst'), l.tag)
        redis.call('ZREM', queue_key(l.q, 'ring'), l.tag)
      end
      sent = sent + 1
    else
      l.out[#l.out] = nil
      l.n = l.n - 1
    end
  end
  return sent
end

-- Tags that untagged tasks got (celery_affinity/message.py) never come back.
local function remember_warm(l)
  local cap = conf(l.q).warm
  if cap == 0 or string.sub(l.tag, 1, 9) == 'untagged:' then return end
  redis.call('HSET', queue_key(l.q, 'warm'), l.tag, l.inc .. ':' .. l.i)
  redis.call('ZADD', queue_key(l.q, 'warmz'), text(NOW), l.tag)
  if redis.call('ZCARD', queue_key(l.q, 'warmz')) > cap then
    local oldest = redis.call('ZPOPMIN', queue_key(l.q, 'warmz'))
    redis.call('HDEL', queue_key(l.q, 'warm'), oldest[1])
  end
end

-- End a lease that has nothing out. The slot keeps the answer to its last settle only.
local function release(l, to_front)
  local rest = {}
  for _, slot in ipairs(holders(l.q, l.tag)) do
    if slot ~= l.inc .. ':' .. l.i then rest[#rest + 1] = slot end
  end
  if #rest > 0 then
    redis.call('HSET', queue_key(l.q, 'held'), l.tag, table.concat(rest, ' '))
    if conf(l.q).moving then end_move(l.q, l.tag, string.match(rest[1], '^[^:]+')) end
  else
    redis.call('HDEL', queue_key(l.q, 'held'), l.tag)
  end
  redis.call('SREM', worker_key(l.inc, 'leased'), l.i)
  redis.call('HDEL', slot_key(l.inc, l.i), unpack(FIELDS, 1, #FIELDS - 2))
  remember_warm(l)
  enlist(l.q, l.tag, to_front)
end

-- Lease a tag that is off the ring to a slot that is off the free list; false if the tag had
-- nothing to dispatch after all.
local function open_lease(q, tag, inc, i, w)
  local me = inc .. ':' .. i
  local held = redis.call('HGET', queue_key(q, 'held'), tag)
  redis.call('HSET', queue_key(q, 'held'), tag, held and held .. ' ' .. me or me)
  redis.call('SADD', worker_key(inc, 'leased'), i)
  local l = {inc = inc, i = i, q = q, tag = tag, epoch = grow(q, 'epoch'), n = 0, x = 0,
    cn = concurrency(q, tag), t = NOW, miss = 0, out = {}, opened = NOW}
  redis.call('HSET', slot_key(inc, i), 'q', q, 'tag', tag, 'epoch', l.epoch, 'cn', l.cn,
    'o', text(NOW))
  if conf(q).warm_wait > 0 then redis.call('HDEL', queue_key(q, 'since'), tag) end
  local last = conf(q).warm > 0 and redis.call('HGET', queue_key(q, 'warm'), tag)
  if last then count(q, last == me and 'warm' or 'moved') end
  local sent = pump(l, w)
  save_lease(l)
  if sent == 0 then release(l) end
  if sent > 0 and conf(q).lacking then redis.call('HDEL', queue_key(q, 'needs'), tag) end
  if sent > 0 and conf(q).moving then end_move(q, tag, inc) end
  count(q, 'leases')
  return sent > 0
end

-- Give back what a lease has out, in order, to the head of its tag: the unstarted, and with
-- `started` also what runs, which then counts as one delivery more. `tells`: the caller tells whoever
-- waits for the first if that is buried. How many went back (or ended).
local function take_back(l, started, tells)
  local out, kept, first = l.out, {}, l.out[1]
  if started and l.mates then
    out = {first}
    for entry in string.gmatch(l.mates, '%d+') do
      out[#out + 1] = {entry = entry, token = first.token}
    end
    out[#out + 1] = l.out[2]
    l.mates = false
  end
  for k = #out, 1, -1 do
    local o = out[k]
    if o.token and not started then
      kept[1] = o
    else
      local starts = o.token and redis.call('HINCRBY', queue_key(l.q, 'att'), o.entry, 1) or 0
      if not o.token and l.cn > 1 then redis.call('SREM', queue_key(l.q, 'unst'), l.tag) end
      if l.fin == o.entry .. ' failed' and conf(l.q).failure > 0 then
        bury(l.q, o.entry, l.tag, 'it ran into its time limit (on_failure)', nil, true)
        count(l.q, 'settled')
      elseif l.fin and string.match(l.fin, '^%d+') == o.entry then
        forget_entry(l.q, o.entry)
        count(l.q, 'settled')
      elseif o.token and conf(l.q).bury_lost then
        bury(l.q, o.entry, l.tag, 'its process was lost after its start (on_lost)', nil,
          tells and o == first and 'soon')
      elseif starts >= conf(l.q).deliveries then
        bury(l.q, o.entry, l.tag, 'started ' .. starts .. ' times without an end (max_deliveries)',
          nil, tells and o == first and 'soon')
      else
        put_back(l.q, l.tag, o.entry)
        count(l.q, 'requeued')
      end
      l.n = l.n - 1
    end
  end
  l.out = kept
  return #out - #kept
end
