"""The texts of the ledger's scripts.

They are data in ``lua/``; a line ``-- @include name`` takes in ``lua/include/name.lua``.

While Redis' memory is full (``maxmemory``, ``noeviction``) it refuses a script's first write if
that could take memory, and no later one: it cannot stop a script half way. So a script that was
refused has written nothing, and one whose first write is a DEL is not refused
(test_while_memory_is_full_a_script_is_done_whole_or_not_at_all). No ``#!lua`` flags: Redis 6.2
does not know them.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files

__all__ = ("LET_THROUGH", "source", "source_although_full")

#: Scripts that go on while memory is full: they keep leases alive, move what is there already, or
#: free it. What brings in more is refused: intake (but see intake.py), what operators ask for.
LET_THROUGH = frozenset(
    (
        *(
            "claim",
            "configure",
            "renew",
            "resign",
            "promote",
            "rescue",
            "rebase",
            "told",
            "resolve",
        ),
        *("register", "serve", "heartbeat", "drain", "leave", "process_up", "occupy", "vacate"),
        *("start", "refused", "take", "settle", "settle_batch", "discard", "lost", "finish"),
    )
)

_INCLUDE = re.compile(r"^-- @include (\w+)$", re.MULTILINE)
_COMMENT = re.compile(r"^\s*--.*\n", re.MULTILINE)


@cache
def source(name: str) -> str:
    """The text of a script with its includes where it names them, without comments.

    What stands below the common way out of a script costs its calls nothing: each call makes every
    function anew that it comes by.
    """
    folder = files("celery_affinity") / "lua"

    def included(line: re.Match[str]) -> str:
        return (folder / "include" / f"{line.group(1)}.lua").read_text()

    return _COMMENT.sub("", _INCLUDE.sub(included, (folder / f"{name}.lua").read_text()))


@cache
def source_although_full(name: str) -> str:
    """The text of a script that also runs while memory is full."""
    return "redis.call('DEL', KEYS[1] .. 'full')\n" + source(name)
