-- Names of keys, the clock, and what a queue and a worker are set to.
--
-- KEYS[1] is the namespace's prefix, "{affinity:<namespace>}:". All other keys are computed
-- from it and share its hash slot; the text of a tag or a queue is never inside the braces.
--
--   q:<queue>:c        hash    counters: seq, epoch, term, admitted, settled, ...; born: the first
--                              term in this data set; carrier: the latest term of the first shard's
--                              leader that was heard of in this one; wait:<ms>, wait:inf, wait:sum: how long sampled
--                              entries waited (waits.lua)
--   q:<queue>:conf     hash    max_batch_size, tag_concurrency, ... (written by the leader); evac: it
--                              is stopped, paused: it dispatches nothing, revoked: some tasks are,
--                              lacking: some workers lack tasks, halts: some tags are halted, moving:
--                              some are on their way to another worker, marks: big has some,
--                              batches: names of batch tasks, each between two line feeds,
--                              looked: the place in the ring that the leader's look came to,
--                              passed: the same of slots that look for work (match)
--   q:<queue>:stage    list    messages of an evacuation under way
--   q:<queue>:limits   hash    tag -> its own concurrency;  set: hash, those that an operator set
--   q:<queue>:m        hash    entry -> the message as the producer sent it
--   q:<queue>:joined   hash    sampled entry that has not started -> when it joined its backlog (ms)
--   q:<queue>:att      hash    entry -> starts that did not settle (absent: none)
--   q:<queue>:ring     zset    ready tags by place: the time (us) since which they wait
--   q:<queue>:held     hash    tag -> "incarnation:slot ..." of its leases
--   q:<queue>:unst     set     tags with concurrency > 1 whose newest dispatch has not started
--   q:<queue>:idle     zset    "incarnation:slot" by the time since which it is free
--   q:<queue>:eta      zset    "entry:tag" by due time (ms)
--   q:<queue>:warm     hash    tag -> the slot that had it last;  warmz: zset, its LRU order
--   q:<queue>:since    hash    tag in the ring -> since when (ms), with warm_wait only
--   q:<queue>:needs    hash    tag -> task that the worker which had it last does not know
--   q:<queue>:hold     zset    tags that wait for an ordered retry, by its due time (ms);
--                              retrying: hash, its entry -> time of its first retry (ms)
--   q:<queue>:dead     hash    entry -> why it was buried;  deadm: hash, its message;
--                              deadz: zset, the entries by number;
--                              untold: list, entries whose callers do not know yet;
--                              telling: zset, those that a worker is about to tell of -> until when
--                              that is believed (ms)
--   q:<queue>:halted   hash    tag that waits for an operator (its hold is +inf) -> "block:<entry>"
--                              or "park:<entry>": what failed (on_failure), or "pause", or several;
--                              later: hash, tag -> when the ordered retry at its head is due (ms)
--   q:<queue>:moves    hash    tag -> "<incarnation that it goes to> <until when (ms)>"
--   q:<queue>:gone     hash    tag -> its last entry that is revoked
--   q:<queue>:big      zset    tags by the length that their backlog had (16, 32, 64, ...)
--   q:<queue>:pace     list    "ms seq leases settled", one a second at most while they change
--   q:<queue>:done:<t> string  answer to the request with token t, for its repeat; expires
--   q:<queue>:leader   string  "<candidate> <term>", expires
--   q:<queue>:wake     list    doorbell of the leader;  vacant: list, doorbell of candidates
--   q:<queue>:once     zset    keys of messages that are admitted once, until when each is kept (ms)
--   q:<queue>:inbox    list    of a queue whose broker is elsewhere: messages carried here (carrying.py);
--                              back: list, messages of an evacuation for it; batch: list, those of them
--                              that are being published; giving: string, the name of that batch;
--                              carried: zset, identity of each -> until when it is known (ms);
--                              answer: string, "<token> <n>" of the last request to carry, expires;
--                              abroad: hash, worker queue on the broker -> its incarnation
--   q:"beat:<app>":... leader, vacant, c as above: the election of the beat that sends the app's
--                              periodic tasks; runs: hash, entry -> "<due> <schedule>" of its last
--                              run;  unsent: hash, entry -> due, claimed but not yet published
--   b:<n>:<queue>:<tag> list   backlog: entries in order, n = length of the queue's name
--   schema             string  version of this layout
--   changes            list    what operators asked for, the latest first (JSON)
--   revoked            zset    task id -> how long the note is kept (ms)
--   workers            zset    incarnation -> when its heartbeat is overdue (ms)
--   w:<inc>:info       hash    name, state, depth, slots, cap (most slots it ever had), queues, junk,
--                              change (number of its last change of queues or slots), beat
--   w:<inc>:idle       set     free slots;  leased: set;  busy: hash, token -> slot of an
--                              ordinary task ("-": owed), or of another shard ("away:<slot>");  owed: list of such tokens;
--                              out: list, dispatched, to be published on another broker (relay.py);
--                              lacks: set, names of tasks that it turned out not to know
--   s:<inc>:<slot>     hash    the slot's lease and the answer to its last settle; discarded: the last
--                              entry that ended there unstarted, its epoch, and what was answered
local P = KEYS[1]
local TIME = redis.call('TIME')
local NOW_US = TIME[1] * 1000000 + TIME[2]
local NOW = math.floor(NOW_US / 1000)

local function text(n) return string.format('%.0f', n) end
local function queue_key(q, name) return P .. 'q:' .. q .. ':' .. name end
local function backlog_key(q, tag) return P .. 'b:' .. #q .. ':' .. q .. ':' .. tag end
local function worker_key(inc, name) return P .. 'w:' .. inc .. ':' .. name end
local function slot_key(inc, i) return P .. 's:' .. inc .. ':' .. i end
local function count(q, name, by) redis.call('HINCRBY', queue_key(q, 'c'), name, by or 1) end

-- Whether it is noted how long this entry waits: about one in ten is, without a period of its own.
local function is_sampled(entry) return tonumber(entry) * 0.6180339887 % 1 < 0.1 end

-- The next of a growing number: above the last, and above any that a lost data set held.
local function grow(q, name)
  local last = tonumber(redis.call('HGET', queue_key(q, 'c'), name) or 0)
  local n = math.max(last + 1, NOW_US)
  redis.call('HSET', queue_key(q, 'c'), name, text(n))
  return text(n)
end

local function ring_bell(q)
  local bell = queue_key(q, 'wake')
  if redis.call('LLEN', bell) == 0 then redis.call('LPUSH', bell, '1') end
end

-- The string of a JSON text whose first quote is there, with its quotes.
local function quoted(raw, from)
  local to = from
  repeat
    to = string.find(raw, '"', to + 1, true)
    local slashes = to and #string.match(string.sub(raw, from + 1, to - 1), '\\*$')
  until not to or slashes % 2 == 0
  return to and string.sub(raw, from, to)
end

-- A header of a message. Python admits what cjson cannot read: a lone surrogate in some header.
local function header(raw, name)
  local ok, m = pcall(cjson.decode, raw)
  if ok then return m.headers[name] end
  local _, from = string.find(raw, '"' .. name .. '":%s*"')
  local found = from and quoted(raw, from) or string.match(raw, '"' .. name .. '":%s*(-?%d+)')
  ok, m = pcall(cjson.decode, '[' .. (found or '') .. ']')
  return ok and m[1] or nil
end

local CONF = {}
local function conf(q)
  local c = CONF[q]
  if not c then
    local v = redis.call('HMGET', queue_key(q, 'conf'), 'max_batch_size', 'tag_concurrency',
      'mapped', 'max_deliveries', 'warm_tags', 'evac', 'revoked', 'lacking', 'batch_ms', 'bury_lost',
      'warm_wait', 'ordered', 'failure', 'halts', 'paused', 'moving', 'marks', 'batches', 'shards', 'looked', 'passed')
    c = {batch = tonumber(v[1] or 10), concurrency = tonumber(v[2] or 1), mapped = v[3] == '1',
      deliveries = tonumber(v[4] or 3), warm = tonumber(v[5] or 1000), stopped = v[6] and true,
      revoked = v[7] and true, lacking = v[8] and true, batch_ms = tonumber(v[9] or 0),
      bury_lost = v[10] == '1', warm_wait = tonumber(v[11] or 0), ordered = tonumber(v[12] or 0),
      failure = tonumber(v[13] or 0), halts = v[14] and true, still = (v[6] or v[15]) and true,
      moving = v[16] and true, marks = v[17] and true, batches = v[18],
      sharded = tonumber(v[19] or 1) > 1, looked = v[20], passed = v[21]}
    CONF[q] = c
  end
  return c
end

local function concurrency(q, tag)
  if conf(q).mapped then
    local own = redis.call('HGET', queue_key(q, 'limits'), tag)
    if own then return tonumber(own) end
  end
  return conf(q).concurrency
end

-- The layout's version found in this namespace if it is not the caller's, else nil.
local function other_schema(version)
  local found = redis.call('GET', P .. 'schema')
  if not found then redis.call('SET', P .. 'schema', version) end
  if found and found ~= version then return found end
  return nil
end

-- A worker's record, or false for one that is not (or no longer) registered.
local WORKERS = {}
local function worker(inc)
  local w = WORKERS[inc]
  if w == nil then
    local v = redis.call('HMGET', worker_key(inc, 'info'), 'state', 'depth', 'queues', 'timeout', 'slots')
    w = false
    if v[1] then
      w = {active = v[1] == 'active', depth = tonumber(v[2]), timeout = tonumber(v[4]),
        size = tonumber(v[5]), queues = {}, lists = {}, slots = {}}
      for q, slots, list in string.gmatch(v[3], '([^\t\n]+)\t([^\t\n]+)\t([^\n]+)') do
        w.queues[#w.queues + 1] = q
        w.slots[q] = tonumber(slots)
        w.lists[q] = list
      end
    end
    WORKERS[inc] = w
  end
  return w
end

-- Whether the worker lets this slot work for the queue (any more).
local function serves(w, q, i)
  return w.slots[q] ~= nil and tonumber(i) < w.slots[q]
end
