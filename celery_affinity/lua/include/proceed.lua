-- After something a lease had out has ended: its next message.

local function drop_first(l)
  l.out[1] = l.out[2]
  l.out[2] = nil
end

-- True if the lease goes on; the caller saves it.
local function proceed(l, w)
  l.miss = 0
  if w and w.active then pump(l, w) end
  if #l.out > 0 and is_halted(l.q, l.tag) then take_back(l, false) end
  return #l.out > 0
end
