"""What an operator may do to queues, tags and workers, as methods of `Affinity`.

Each change is written down before it is made (`Affinity.changes`), so none goes unrecorded; one
that was refused, or whose caller died in between, is in the record too.

What is asked of a whole queue is done in each of its shards, one after the other; whoever dies in
between has done some of them, and a repeat does the rest
(test_a_command_that_dies_between_two_shards_is_finished_by_a_repeat).
"""

from __future__ import annotations

from functools import partial

from celery_affinity import carrying, evacuation, steering
from celery_affinity.bound import Bound
from celery_affinity.exceptions import OperationError
from celery_affinity.intake import shard_in
from celery_affinity.message import tag_text
from celery_affinity.settings import AffinityQueue
from celery_affinity.sharding import incarnation_in
from celery_affinity.types import EvacuationRecord
from celery_affinity.who import write_down

__all__ = ("Operations",)

#: For how long a moved tag waits for its worker (it goes anywhere after that).
MOVE_SECONDS = 3600.0


class Operations(Bound):
    """Mixed into `Affinity`.

    In all of these ``by`` is who asks, for the record; default: this process' user and host.
    """

    def pause(self, queue: str, tag: str | None = None, *, by: str = "") -> None:
        """Give a tag, or without one all tags of the queue, no slot until `resume`.

        What runs ends; what has not started goes back to its place. Messages are taken in.
        """
        declared = self._reachable(queue)
        if tag is None:
            write_down(self._scripts, by, "pause", queue)
            for part in declared.parts:
                self._shards.scripts(part.shard).pause(part.state)
        else:
            text = tag_text(tag)
            write_down(self._scripts, by, "pause", queue, text)
            scripts, part = self._part(queue, text)
            scripts.pause_tag(part.state, text)

    def resume(self, queue: str, tag: str | None = None, *, by: str = "") -> bool:
        """Let a paused or halted (``on_failure``) tag go on, or without one the paused or
        evacuated queue. Tags that are paused themselves stay so.

        Returns:
            False for a tag that was neither paused nor halted: nothing was changed.
        """
        declared = self._reachable(queue)
        if tag is None:
            write_down(self._scripts, by, "resume", queue)
            if self._scripts.is_evacuated(declared.state):
                self._give_back(declared)
            evacuation.resume(self._evacuees(declared))
            return True
        text = tag_text(tag)
        write_down(self._scripts, by, "resume", queue, text)
        scripts, part = self._part(queue, text)
        return scripts.resume_tag(part.state, text)

    def drain(self, worker: str, *, by: str = "") -> int:
        """Give a worker no more affinity tasks; what runs there ends. It has no way back but a
        restart.

        Arguments:
            worker: Its node name, the part before the "@", or its ``worker_id``.

        Returns:
            How many entries that had not started went back to the head of their tags.

        Raises:
            NoSuchWorkerError: If it names none, or several.
        """
        found = self._worker(worker)
        write_down(self._scripts, by, "drain", "", found.name)
        return sum(
            self._shards.scripts(shard).drain(incarnation_in(found.worker_id, shard))
            for shard in range(self.settings.shards)
        )

    def move(self, queue: str, tag: str, worker: str, *, by: str = "") -> None:
        """Have a tag's next lease be one of that worker, after what runs elsewhere has ended.

        The tag waits for a slot there, for an hour at most, also while others are free. From then
        on it is an ordinary tag, which goes where it was last if it can.

        Raises:
            NoSuchWorkerError: If the name fits no worker, or several.
            OperationError: If that worker takes no work of the queue, or too many moves are
                under way.
        """
        text = tag_text(tag)
        scripts, part = self._part(queue, text)
        found = self._worker(worker)
        write_down(self._scripts, by, "move", queue, text, f"to {found.name}")
        incarnation = incarnation_in(found.worker_id, part.shard)
        answer = scripts.move(part.state, text, incarnation, MOVE_SECONDS)
        if answer == -1:
            raise OperationError(
                f"worker {found.name!r} takes no work of {queue!r} (it drains, has stopped, or "
                "does not serve it): choose another one"
            )
        if answer == -2:
            raise OperationError(
                "32 moves are under way, which is the most: wait until tags have arrived"
            )

    def limit(self, queue: str, tag: str, concurrency: int | None, *, by: str = "") -> None:
        """Set how many tasks of a tag may run at once; None: what is declared for it.

        It goes before ``tag_concurrency`` until it is taken back, also over restarts. Lowered, what
        runs ends, and no more start before fewer run than may.

        Raises:
            OperationError: If 1,000 tags have such a limit, or the number is out of range.
        """
        text = tag_text(tag)
        scripts, part = self._part(queue, text)
        if concurrency is not None and not 1 <= concurrency <= 1_000_000:
            raise OperationError(
                f"found a concurrency of {concurrency}, expected 1 to 1,000,000: to let none run, "
                "pause the tag"
            )
        how, number = "set", concurrency
        if number is None:
            how = "mapped" if text in part.own_concurrencies else "default"
            number = part.own_concurrencies.get(text, part.default_concurrency)
        asked = f"concurrency {number}" + ("" if how == "set" else " (as declared)")
        write_down(self._scripts, by, "limit", queue, text, asked)
        if not scripts.limit(part.state, text, number, how)[0]:
            raise OperationError(
                "1,000 tags have limits of their own by now, which is the most: take some back, or "
                "declare them as tag_concurrency"
            )

    def purge(self, queue: str, tag: str, *, by: str = "") -> int:
        """Delete what a tag has waiting, in steps; what runs ends. Returns how many entries.

        Nobody is told: results stay PENDING. To tell, use `revoke_tag`.
        """
        text = tag_text(tag)
        scripts, part = self._part(queue, text)
        write_down(self._scripts, by, "purge", queue, text)
        due = self._shards.ledger(part.shard).due_entries(part, text)
        return steering.purge(scripts, part.state, text, due)

    def revoke_tag(self, queue: str, tag: str, *, by: str = "") -> int:
        """Revoke all tasks that a tag has waiting. Returns how many.

        Each ends as REVOKED when its turn comes, as quickly as workers can say so. What runs is
        left alone, but not retried. Tasks that come later run. It is remembered for 7 days, and not
        over an evacuation.

        Raises:
            OperationError: If 1,000 tags are being revoked.
        """
        text = tag_text(tag)
        scripts, part = self._part(queue, text)
        ledger = self._shards.ledger(part.shard)
        write_down(self._scripts, by, "revoke", queue, text)
        count = steering.revoke(
            scripts,
            part.state,
            text,
            lambda: ledger.due_entries(part, text),
            lambda entries: ledger.message_headers(part, entries),
        )
        if count is None:
            raise OperationError(
                "1,000 tags are being revoked, which is the most: wait until some are through, or "
                "purge"
            )
        return count

    def evacuate(self, queue: str, timeout: float = 60.0, *, by: str = "") -> EvacuationRecord:
        """Stop the queue and write what waits back as the plain Celery messages it was.

        In order per tag, due times included. It stays stopped until `resume`.

        Arguments:
            timeout: Seconds to wait for running tasks; with some left nothing is moved, and a
                repeat goes on.
        """
        declared = self._reachable(queue)
        write_down(self._scripts, by, "evacuate", queue)
        record = evacuation.evacuate(self._evacuees(declared), timeout)
        if record.done:
            self._give_back(declared)
        return record

    def _evacuees(self, queue: AffinityQueue) -> list[evacuation.Part]:
        return [
            evacuation.Part(
                self._shards.scripts(part.shard),
                part.state,
                self.delivery.main_list(part),
                partial(self._shards.ledger(part.shard).entries, part),
            )
            for part in queue.parts
        ]

    def _give_back(self, queue: AffinityQueue) -> None:
        broker = self.delivery.broker
        if broker is not None:
            source = broker.source(queue.pending)
            try:
                carrying.give_back(self._scripts, queue.state, source, self._spread(queue))
            finally:
                source.close()

    def _spread(self, queue: AffinityQueue) -> carrying.Spread | None:
        if queue.shards == 1:
            return None
        others = [(self._shards.scripts(part.shard), part.state) for part in queue.parts[1:]]
        tag_of, spread = self._tag_of_message, queue.untagged == "spread"
        return carrying.Spread(others, lambda raw: shard_in(raw, tag_of, spread, queue.shards))
