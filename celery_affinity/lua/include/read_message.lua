-- Read a message of the pending queue just far enough to admit it.

local function eta_ms(iso)
  local y, mo, d, h, mi, s, rest = string.match(iso,
    '^(%d%d%d%d)%-(%d%d)%-(%d%d)T(%d%d):(%d%d):(%d%d)(.*)$')
  if not y then return nil end
  local fraction, sign, oh, om = string.match(rest, '^%.?(%d*)([+-])(%d%d):(%d%d)$')
  if not sign then return nil end
  y, mo, d = tonumber(y), tonumber(mo), tonumber(d)
  if mo <= 2 then y = y - 1; mo = mo + 12 end
  local days = 365 * y + math.floor(y / 4) - math.floor(y / 100) + math.floor(y / 400)
    + math.floor((153 * (mo - 3) + 2) / 5) + d - 719469
  local seconds = days * 86400 + h * 3600 + mi * 60 + s
  local offset = oh * 3600 + om * 60
  seconds = sign == '+' and seconds - offset or seconds + offset
  return seconds * 1000 + math.floor(tonumber('0.' .. fraction .. '0') * 1000)
end

local function tag_text(value)
  if type(value) == 'number' and value % 1 == 0 and math.abs(value) < 2^53 then
    value = text(value)
  end
  if type(value) == 'string' and #value > 0 and #value <= 512 then return value end
  return nil
end

-- What cjson takes for JSON and Python does not (0x10, nan, 01, +1), or only up to a depth.
local STRICT = cjson.new()
STRICT.decode_invalid_numbers(false)
STRICT.decode_max_depth(100)

local function is_digit(byte) return byte and byte >= 48 and byte <= 57 end

-- Whether a number may end in its point ("1.", "1.e5"), as cjson allows.
local function has_bare_point(raw)
  local at = string.find(raw, '.', 2, true)
  while at do
    local before, _, after = string.byte(raw, at - 1, at + 1)
    if is_digit(before) and not is_digit(after) then
      local number = string.sub(raw, math.max(1, at - 20), at - 1)
      if string.find(number, '[:,%[]%s*%-?%d+$') or string.find(number, '^%d+$') then return true end
    end
    at = string.find(raw, '.', at + 1, true)
  end
  return false
end

-- Whether a decoded value has no number too large to be one: Python reads no integer of more than 4,300
-- digits.
local function is_finite(value)
  if type(value) == 'number' then return value > -math.huge and value < math.huge end
  if type(value) == 'table' then
    for _, inner in pairs(value) do
      if not is_finite(inner) then return false end
    end
  end
  return true
end

-- Returns the tag and the due time (or nil), or nothing for a message that Python must look
-- at: unusable, untagged, or in a shape that cannot be stamped as it is. kombu writes plain ASCII; of
-- anything else cjson takes more for JSON than a worker's kombu does.
local function read_message(raw)
  if #raw > 16777216 then return nil end
  -- Anchored, this is one loop; a search for a character outside would begin anew at each (for a KB
  -- 9 us instead of 2).
  if not string.find(raw, '^[\32-\126]*$') then return nil end
  -- kombu makes a value of a type out of such a mark, or cannot; it may be written in escapes.
  if string.find(raw, '"__type__"', 1, true) or (string.find(raw, '\\u00', 1, true)
    and string.find(raw, '\\u00[567][0459fF]')) or has_bare_point(raw) then return nil end
  local ok, m = pcall(STRICT.decode, raw)
  if not ok or type(m) ~= 'table' then return nil end
  local h = m.headers
  if type(h) ~= 'table' or type(h.id) ~= 'string' or type(h.task) ~= 'string'
    or h.affinity_stamp ~= nil or h.affinity_once ~= nil or type(m.body) ~= 'string' or type(m.properties) ~= 'table'
    or type(m['content-type']) ~= 'string' then return nil end
  -- What kombu needs of a message to make one of it at all.
  local encoding = m.properties.body_encoding
  if type(m.properties.delivery_tag) ~= 'string' or (encoding ~= nil and encoding ~= 'base64') then
    return nil
  end
  -- zlib makes at most 1032 bytes of one, and 64 MiB is the most that a body may become.
  local zip = h.compression
  if zip ~= nil and zip ~= cjson.null and ((zip ~= 'application/x-gzip' and zip ~= 'gzip'
    and zip ~= 'zlib') or #m.body > 86000) then return nil end
  local _, opens = string.find(raw, '"headers": {"', 1, true)
  if not opens or string.find(raw, '{', 2, true) ~= opens - 1
    or string.find(string.sub(raw, 1, opens), '[', 1, true)
    or string.find(raw, '"headers"', opens, true) then return nil end
  if #raw > 4300 and not (is_finite(h) and is_finite(m.properties)) then return nil end
  local tag = tag_text(h.identify_tag)
  if not tag then return nil end
  -- A number is a tag only if it is written as Python would write it: 5.0 and 5 are one to Lua.
  if type(h.identify_tag) == 'number' then
    local written = '"identify_tag": ' .. tag
    if tag == '-0' or not (string.find(raw, written .. ',', 1, true)
      or string.find(raw, written .. '}', 1, true)) then return nil end
  end
  if h.eta == nil or h.eta == cjson.null then return tag end
  local eta = type(h.eta) == 'string' and eta_ms(h.eta)
  if not eta then return nil end
  return tag, eta
end
