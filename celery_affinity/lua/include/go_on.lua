-- After something a lease had out has ended: its next message, or another tag's, or nothing.

-- End a lease that does not go on; why.
local function pass_on(l, w)
  local reason = 'drained'
  if w and w.active and serves(w, l.q, l.i) then
    reason = redis.call('EXISTS', backlog_key(l.q, l.tag)) == 0 and 'empty'
      or is_halted(l.q, l.tag) and 'halted' or on_hold(l.q, l.tag) and 'retry' or 'batch'
  end
  release(l)
  halt_others(l)
  LEFT = {q = l.q, tag = l.tag}
  if w then take(l.inc, l.i, w) end
  LEFT = nil
  match(l.q, 10)
  return reason
end

local function go_on(l, w)
  if proceed(l, w) then
    save_lease(l)
    return 'held'
  end
  return pass_on(l, w)
end
