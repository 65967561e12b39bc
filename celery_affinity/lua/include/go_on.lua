-- After something a lease had out has ended: its next message, or another tag's, or nothing.

local function go_on(l, w)
  l.miss = 0
  if w and w.active then pump(l, w) end
  if #l.out > 0 then
    save_lease(l)
    return 'held'
  end
  local reason = 'drained'
  if w and w.active and serves(w, l.q, l.i) then
    reason = redis.call('EXISTS', backlog_key(l.q, l.tag)) == 0 and 'empty'
      or on_hold(l.q, l.tag) and 'retry' or 'batch'
  end
  release(l)
  if w then take(l.inc, l.i, w) end
  match(l.q, 10)
  return reason
end

local function drop_first(l)
  l.out[1] = l.out[2]
  l.out[2] = nil
end
