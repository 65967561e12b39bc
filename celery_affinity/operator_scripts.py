"""The scripts that only operators run: one typed method for each, beside those of `Scripts`."""

from __future__ import annotations

from collections.abc import Sequence

from celery_affinity.scripts import Scripts

__all__ = ("OperatorScripts",)


class OperatorScripts(Scripts):
    """Calls of all of the ledger's scripts for one namespace.

    Does not: decide anything, or keep a record of who asked (`note` does, when it is called).
    """

    def note(self, token: str, change: str) -> bool:
        """Write down what an operator asks for; see note.lua."""
        return bool(self._call("note", token, change))

    def pause_tag(self, state: str, tag: str) -> bool:
        """Give a tag no slot until it is resumed; False if it was paused."""
        return bool(self._call("pause_tag", state, tag)[0])

    def pause(self, state: str) -> int:
        """Dispatch nothing until the queue is resumed; returns entries given back."""
        cursor, back = b"0", 0
        while True:
            cursor, given_back = self._call("pause", state, cursor)
            back += int(given_back)
            if cursor == b"0":
                return back

    def limit(self, state: str, tag: str, concurrency: int, how: str) -> tuple[bool, int]:
        """Returns (done, slots that hold it), or (False, tags with a limit); see limit.lua."""
        done, number = self._call("limit", state, tag, concurrency, how)
        return done == 1, int(number)

    def move(self, state: str, tag: str, incarnation: str, seconds: float) -> int:
        """1 on its way, 0 it is there, -1 no such worker, -2 too many moves; see move.lua."""
        return int(self._call("move", state, tag, incarnation, int(seconds * 1000))[0])

    def purge_tag(
        self, state: str, token: str, tag: str, last: int, limit: int, due: Sequence[int] = ()
    ) -> tuple[int, bool]:
        """Returns (how many were deleted, whether more are to be); see purge_tag.lua."""
        deleted, more = self._call("purge_tag", state, token, tag, last, limit, *due)
        return int(deleted), bool(more)

    def revoke_tag(self, state: str, tag: str) -> tuple[int, list[int]] | None:
        """Returns (entries that wait, entries that run), or None: too many; see revoke_tag.lua."""
        done, waiting, *running = self._call("revoke_tag", state, tag)
        return (int(waiting), [int(entry) for entry in running]) if done == 1 else None

    def find(self, key: str, task_id: str, page: int, page_bytes: int) -> int | None:
        """The entry of a task's message, or its place in a list; see find.lua. Reads only."""
        cursor = b"0"
        while True:
            cursor, found = self._call("find", task_id, cursor, page, page_bytes, lists=[key])
            if found:
                return int(found)
            if cursor == b"0":
                return None
