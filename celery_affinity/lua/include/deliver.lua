-- Delivery on the same Redis: the stamped message goes into the worker queue's list itself.

-- The stamp becomes the first header. Intake admits only messages whose first inner brace
-- opens the headers, so the place needs no parsing and the message is never re-encoded.
local function stamped(raw, stamp, note)
  local _, brace = string.find(raw, '{', 2, true)
  return string.sub(raw, 1, brace) .. '"affinity_stamp": "' .. stamp .. '", ' .. note
    .. string.sub(raw, brace + 1)
end

-- A revoked task is dispatched like any other: its worker says so to whoever waits for it.
local function revoked_note(q, tag, entry, raw)
  if not conf(q).revoked then return '' end
  local last = redis.call('HGET', queue_key(q, 'gone'), tag)
  if last and tonumber(entry) <= tonumber(last) then return '"affinity_revoked": true, ' end
  local id = header(raw, 'id')
  return id and redis.call('ZSCORE', P .. 'revoked', id) and '"affinity_revoked": true, ' or ''
end

-- Send (again) what lease l has out at position k (1 or 2); false if its message is gone.
local function deliver(l, k, w)
  local o = l.out[k]
  local raw = redis.call('HGET', queue_key(l.q, 'm'), o.entry)
  if not raw then return false end
  local starts = tonumber(redis.call('HGET', queue_key(l.q, 'att'), o.entry) or 0)
  -- (epoch, send number) names one copy: the numbers grow over the lease, a copy that is sent
  -- again has an "r" behind its number.
  local stamp = table.concat({o.entry, l.epoch, o.send, l.inc, l.i, o.place, starts + 1, l.q}, ' ')
  redis.call('LPUSH', w.lists[l.q], stamped(raw, stamp, revoked_note(l.q, l.tag, o.entry, raw)))
  return true
end
