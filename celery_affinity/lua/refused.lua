-- refused: a process has refused a copy, because start said so. Only counted.
--
-- KEYS[1] namespace prefix     ARGV queue
-- Returns 1. A repeat after a lost reply counts again: it is a statistic, nothing goes by it.
-- @include base
count(ARGV[1], 'refused')
return 1
