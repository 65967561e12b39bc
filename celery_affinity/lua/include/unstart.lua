-- What an operator does to a tag, and a failure that halts it, reaches what is dispatched and has not
-- started, too.

-- Give back what a tag's slots have out unstarted, but for those of the worker `spared`. Returns how
-- many entries, the leases that run on, and those that have nothing any more (set_free).
local function unstart(q, tag, spared)
  local back, running, empty = 0, {}, {}
  for _, slot in ipairs(holders(q, tag)) do
    local inc, i = string.match(slot, '^([^:]+):(.+)$')
    if inc ~= spared then
      local l = load_lease(inc, i)
      local out = #l.out
      take_back(l, false)
      back = back + out - #l.out
      if #l.out > 0 then
        save_lease(l)
        running[#running + 1] = l
      else
        empty[#empty + 1] = l
      end
    end
  end
  return back, running, empty
end

local function let_go(leases)
  for _, l in ipairs(leases) do release(l, true) end
end

local function employ(leases)
  for _, l in ipairs(leases) do
    local w = worker(l.inc)
    if w then take(l.inc, l.i, w) end
  end
end

local function set_free(leases)
  let_go(leases)
  employ(leases)
end

-- After the lease l was released: if what ended in it has halted its tag (on_failure), what other slots
-- have out of the tag must not start any more. At most as many slots as the tag has leases.
local function halt_others(l)
  if not is_halted(l.q, l.tag) then return end
  local _, _, empty = unstart(l.q, l.tag)
  set_free(empty)
end
