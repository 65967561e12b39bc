-- The end of one started entry that has not simply ended well.

-- `retries`: for each its message, its due time in ms or ''.
local function end_entry(l, entry, outcome, reason, traceback, retries)
  local q, tag = l.q, l.tag
  if outcome == 'bury' then
    bury(q, entry, tag, reason)
    return
  end
  if outcome == 'again' then
    local raw = redis.call('HGET', queue_key(q, 'm'), entry)
    if raw then admit_entry(q, raw, tag) end
  end
  local kept = false
  for k = 1, #retries, 2 do
    local eta = tonumber(retries[k + 1])
    if k == 1 and outcome ~= 'failed' and keep_place(l, entry, retries[k], eta) then
      kept = true
    else
      admit_entry(q, retries[k], tag, eta)
    end
    if eta then ring_bell(q) end
  end
  if outcome == 'failed' and conf(q).failure > 0 then
    bury(q, entry, tag, reason, nil, true, traceback)
  elseif not kept then
    forget_entry(q, entry)
  end
  count(q, 'settled')
end
