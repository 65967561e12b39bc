"""The real scripts on a real server, under a virtual clock.

A script's text is changed in three ways before it is loaded, and nowhere else: it reads the time
from its last argument instead of the server, an expiry is a note that the next script obeys, and it
tells what it wrote and dispatched beside its answer.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from celery_affinity.embedded import start_server
from celery_affinity.keys import Keys
from celery_affinity.lua_text import source

from .wire import Connection, ErrorReply

STATE = "q"
KEYS = Keys("sim")
PENDING = KEYS.prefix + "pending"

#: What replaces calls whose answer is not a function of the data and the arguments.
REPLACED = (
    (re.compile(r"redis\.call\('TIME'\)"), "SIM_TIME"),
    (re.compile(r"redis\.call\('PEXPIRE', "), "sim_expire(1, "),
    (re.compile(r"redis\.call\('EXPIRE', "), "sim_expire(1000, "),
    (re.compile(r"redis\.call\('PTTL', "), "sim_left("),
    (re.compile(r"redis\.call\('SET', (.+), 'PX', (.+)\)"), r"sim_set(\1, \2)"),
    (re.compile(r"redis\.call\('SET', (.+), 'EX', (.+)\)"), r"sim_set(\1, (\2) * 1000)"),
    (re.compile(r"redis\.call\('SRANDMEMBER', "), "sim_member("),
    (re.compile(r"redis\.p?call\("), "sim_call("),
)
#: Anything like it that is left would read the real clock, or a random number.
FOREIGN = re.compile(r"redis\.p?call|'(TIME|P?EXPIRE\w*|PX|EX|PXAT|EXAT|P?TTL|P?SETEX|SRAND\w+|SPOP)'|math\.random")

PRELUDE = r"""
local CLOCK = tonumber(table.remove(ARGV))
local SIM_TIME = {math.floor(CLOCK / 1000000), CLOCK %% 1000000}
for _, k in ipairs(redis.call('ZRANGEBYSCORE', 'sim:expiry', '-inf', CLOCK)) do
  redis.call('DEL', k)
  redis.call('ZREM', 'sim:expiry', k)
end
local SIM_WRITES, SIM_SENT = 0, {}
local READS = {GET = 1, HGET = 1, HMGET = 1, HGETALL = 1, HEXISTS = 1, HLEN = 1, HVALS = 1, HKEYS = 1,
  LLEN = 1, LPOS = 1, LRANGE = 1, LINDEX = 1, EXISTS = 1, SISMEMBER = 1, SMEMBERS = 1, SCARD = 1, ZCARD = 1,
  ZSCORE = 1, ZRANK = 1, ZRANGE = 1, ZRANGEBYSCORE = 1, ZSCAN = 1, HSCAN = 1, SSCAN = 1, ZCOUNT = 1}
local function sim_call(name, key, ...)
  if not READS[name] then SIM_WRITES = SIM_WRITES + 1 end
  if (name == 'LPUSH' or name == 'RPUSH') and string.find(key, ':wq-', 1, true) then
    local stamp = string.match((...), '"affinity_stamp": "([^"]+)"')
    if stamp then SIM_SENT[#SIM_SENT + 1] = stamp .. '\n' .. (string.match((...), '"nonce": "([^"]+)"') or '') end
  elseif name == 'DEL' then
    redis.call('ZREM', 'sim:expiry', key)
  end
  return redis.call(name, key, ...)
end
local function sim_expire(unit, key, time)
  SIM_WRITES = SIM_WRITES + 1
  if redis.call('EXISTS', key) == 0 then return 0 end
  return redis.call('ZADD', 'sim:expiry', CLOCK + tonumber(time) * unit * 1000, key)
end
local function sim_set(key, value, ms)
  SIM_WRITES = SIM_WRITES + 1
  redis.call('SET', key, value)
  redis.call('ZADD', 'sim:expiry', CLOCK + tonumber(ms) * 1000, key)
end
local function sim_left(key)
  local due = redis.call('ZSCORE', 'sim:expiry', key)
  return due and math.floor((due - CLOCK) / 1000) or -1
end
local function sim_member(key)
  local all = redis.call('SMEMBERS', key)
  table.sort(all)
  return all[1] and all[CLOCK %% #all + 1] or false
end
local function main()
"""
EPILOGUE = """
end
local answer = main()
return {answer, SIM_WRITES, SIM_SENT, redis.call('ZRANGE', '%(ring)s', 0, -1), redis.call('ZCARD', '%(idle)s'),
  redis.call('EXISTS', '%(pending)s', '%(wake)s'), redis.call('EXISTS', '%(vacant)s'), redis.call('EXISTS', '%(wake)s')}
"""
NAMES = {name: KEYS.queue(STATE, name) for name in ("ring", "idle", "wake", "vacant")}
NAMES["pending"] = PENDING


def all_scripts() -> list[str]:
    """Names of the ledger's scripts."""
    found = (files("celery_affinity") / "lua").iterdir()
    return sorted(one.name[:-4] for one in found if one.name.endswith(".lua"))


def virtual(text: str, name: str) -> str:
    """A script's text as the simulation runs it."""
    for pattern, replacement in REPLACED:
        text, hits = pattern.subn(replacement, text)
        if replacement == "SIM_TIME" and hits != 1:
            raise AssertionError(f"{name}.lua reads TIME {hits} times, expected 1 (include/base.lua)")
    if foreign := FOREIGN.search(text):
        raise AssertionError(f"{name}.lua has {foreign.group()!r}, which the virtual clock does not cover yet")
    return PRELUDE % () + text + EPILOGUE % NAMES


@dataclass(frozen=True)
class Reply:
    """What a script answered and did."""

    answer: Any
    writes: int
    #: Stamps that it dispatched, each with the message's nonce.
    sent: tuple[tuple[str, str], ...]
    #: The ready ring afterwards, in its order.
    ring: tuple[str, ...]
    idle: int
    #: Whether the leader's lists (pending, wake) and the candidates' hold something.
    arrivals: bool
    vacant: bool
    bell: bool


class ScriptError(Exception):
    """A script failed in the middle."""


class Ledger:
    """The server, the scripts loaded on it, and one connection."""

    def __init__(self, connection: Connection) -> None:
        #: Any Redis command.
        self.command = connection.command
        self._loaded: dict[str, str] = {}
        self._shas: dict[str, str] = {}

    def load(self, edits: Mapping[str, str] | None = None) -> None:
        """Use these scripts: as they are, but for those whose text is given."""
        for name in all_scripts():
            text = virtual((edits or {}).get(name) or source(name), name)
            key = hashlib.sha1(text.encode()).hexdigest()
            if key not in self._loaded:
                self._loaded[key] = self.command("SCRIPT", "LOAD", text).decode()
            self._shas[name] = self._loaded[key]

    def run(self, name: str, args: Sequence[Any], lists: Sequence[str], clock_us: int) -> Reply:
        """Call a script at a virtual time.

        Raises:
            ScriptError: If it failed, which may have been after it wrote.
        """
        try:
            got = self.command(
                "EVALSHA", self._shas[name], 1 + len(lists), KEYS.prefix, *lists, *args, clock_us
            )
        except ErrorReply as error:
            raise ScriptError(f"{name}{tuple(args)!r}: {error}") from None
        answer, writes, sent, ring, idle, arrivals, vacant, bell = got
        pairs = [one.decode().split("\n") for one in sent]
        return Reply(
            answer, writes, tuple((p[0], p[1]) for p in pairs), tuple(t.decode() for t in ring),
            idle, bool(arrivals), bool(vacant), bool(bell),
        )  # fmt: skip

    def expire(self, clock_us: int) -> None:
        """What is over by now goes."""
        for key in self.command("ZRANGEBYSCORE", "sim:expiry", "-inf", clock_us):
            self.command("DEL", key)
            self.command("ZREM", "sim:expiry", key)

    def reset(self) -> None:
        """An empty database."""
        self.command("FLUSHDB")

    def dump(self) -> dict[str, Any]:
        """All keys with their contents (small databases only)."""
        out: dict[str, Any] = {}
        readers = {
            b"string": ("GET",), b"hash": ("HGETALL",), b"set": ("SMEMBERS",),
            b"list": ("LRANGE", 0, -1), b"zset": ("ZRANGE", 0, -1, "WITHSCORES"),
        }  # fmt: skip
        for key in sorted(self.command("KEYS", "*")):
            command, *rest = readers[self.command("TYPE", key)]
            out[key.decode("utf-8", "replace")] = self.command(command, key, *rest)
        return out


@contextmanager
def _own_core(cores: Sequence[int]) -> Iterator[int]:
    """A core that no other simulation has, if there is one."""
    for core in cores:
        with open(Path(tempfile.gettempdir()) / f"affinity-sim-core-{core}", "a") as taken:
            try:
                fcntl.flock(taken, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            yield core
            return
    yield cores[os.getpid() % len(cores)]


@contextmanager
def ledger() -> Iterator[Ledger]:
    """A server of one's own on a unix socket, with the ledger's scripts.

    It shares one core with this process: the two take turns anyway, and a wake-up across cores
    costs more (60 us) than a script (20 us).
    """
    cores = os.sched_getaffinity(0)
    with _own_core(sorted(cores)) as core, tempfile.TemporaryDirectory(prefix="affinity-sim-") as folder:
        os.sched_setaffinity(0, {core})
        path = str(Path(folder) / "s")
        with start_server(extra_args=("--unixsocket", path)):
            connection = Connection(path)
            one = Ledger(connection)
            one.load()
            yield one
            connection.close()
    os.sched_setaffinity(0, cores)
