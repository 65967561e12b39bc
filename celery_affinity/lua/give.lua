-- give: which messages of an evacuation are to be published on another broker next.
--
-- KEYS[1] namespace prefix
-- ARGV    queue, name of the batch that is published now ('' for none), name for the next one, how many at most
-- Returns {'' when all is published, or the name of the batch that is to be; its messages, oldest first}
-- A batch keeps its name and its messages until it is said to be published, whoever asks. A repeat gets the
-- same batch: the last one is gone, and the next one has the name that it asks for.
-- @include base
local q, done, name, most = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local back, batch, giving = queue_key(q, 'back'), queue_key(q, 'batch'), queue_key(q, 'giving')
if done ~= '' and redis.call('GET', giving) == done then redis.call('DEL', batch) end
if redis.call('EXISTS', batch) == 0 then
  if redis.call('EXISTS', back) == 0 then
    redis.call('DEL', giving)
    return {''}
  end
  redis.call('SET', giving, name)
  for _ = 1, most do
    local raw = redis.call('RPOP', back)
    if not raw then break end
    redis.call('LPUSH', batch, raw)
  end
end
local answer = {redis.call('GET', giving)}
local raws = redis.call('LRANGE', batch, 0, -1)
for at = #raws, 1, -1 do answer[#answer + 1] = raws[at] end
return answer
