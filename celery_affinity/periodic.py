"""`AffinityBeat`: among all beats of an app one sends its periodic tasks, each due time once.

Beats elect a sender (leadership.py, a key of its own per app: no worker campaigns for it, and it
has nothing to do with who schedules the queues). A beat that is not elected only waits. The one
that is takes each entry through

    due --claim_run--> unsent --publish--> sent --confirm_run--> the record is the next one's base

- The *due time* follows from the entry's schedule and its last due time, which is in Redis
  (dues.py), not from the moment at which a beat ticks. So all beats derive the same one.
- The *claim* is one script: under the term it replaces the entry's last due time and notes the run
  as unsent. Of two beats that believe to be elected one is refused.
- The run's task id is derived from (namespace, app, entry, due time): whoever publishes it,
  publishes that id. On an affinity queue the ledger admits it once (header `affinity_once`).
- A beat that gets elected reads the records, publishes what is unsent, and goes on from the last
  due times: it sends what fell due meanwhile, up to `CATCH_UP_TERMS` times leader_ttl. If the
  oldest of it is older, all of it becomes one run, as after an outage in Celery.

The sender renews its term between publishing, in the same thread: one that hangs loses it.

A beat that is asked to stop finishes the run that it is publishing (uninterrupted.py).

Crash windows (tests/acceptance/test_periodic.py, tests/integration/test_beats.py and
tests/lua/test_periodic.py):

- After the claim, before the publish: the run is unsent, the next beat publishes it
  (test_a_beat_that_died_between_claim_and_publish_has_its_entry_published_by_the_next).
- After the publish, before the confirmation, or a sender frozen right before its publish: the run
  is published twice, with the same id. An affinity queue drops the second
  (test_the_same_due_entry_is_admitted_once); on an ordinary queue it runs twice: at least once.
- After the confirmation, before the entry is advanced in the scheduler's own store: the next beat
  advances it (test_a_store_that_missed_a_run_follows_the_record).
- A frozen sender that wakes up: its term is refused by the claim
  (test_a_beat_of_a_superseded_term_claims_nothing).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from celery.utils.log import get_logger
from celery.utils.nodenames import gethostname
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from celery_affinity import dues
from celery_affinity.connection import Reachability, connect
from celery_affinity.doorbell import Doorbell
from celery_affinity.exceptions import ConfigurationError
from celery_affinity.keys import Keys
from celery_affinity.leadership import Elector, candidate_name
from celery_affinity.runs import Deposed, Run, Runs, run_id, stamped
from celery_affinity.scripts import Scripts
from celery_affinity.uninterrupted import uninterrupted

__all__ = ("AffinityBeat",)

logger = get_logger(__name__)

#: Runs that were missed are all caught up if the oldest is not older than so many leader_ttl.
CATCH_UP_TERMS = 12
#: Runs of one entry that are sent before the other entries have their turn.
AT_ONCE = 100
#: Seconds to wait before talking to a Redis that did not answer.
RETRY_SECONDS = 0.5
#: Seconds after which a Redis that cannot be used is looked at again.
REFUSED_SECONDS = 5.0


class AffinityBeat:
    """Mixin over any `celery.beat.Scheduler`: ``class Mine(AffinityBeat, DatabaseScheduler)``.

    The scheduler below says which entries there are and publishes them; when they ran last is kept
    in Redis. Its own lock, such as RedBeat's, is turned off: it would keep a second beat from
    standing by. Also campaigns for the affinity queues, in threads, as `celery beat -S affinity`.
    """

    app: Any
    schedule: Mapping[str, Any]
    max_interval: float
    _elector: Elector | None = None
    _is_closed = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Celery makes one first only to show it: there a refusal is a text, later a traceback.
        self._affinity.check_scheduling()
        if getattr(self, "lock_key", None):
            self.lock_key = None

    # Hooks of Celery's scheduler

    def setup_schedule(self) -> None:
        """Called once, in the process that runs; not for introspection."""
        with uninterrupted():  # a thread that is about to start could not be joined by the handler
            self._set_up()

    def _set_up(self) -> None:
        affinity = self._affinity
        settings, node = affinity.settings, f"beat@{gethostname()}"
        self._namespace, self._main = settings.namespace, str(self.app.main or "")
        self._state = Keys.beat_state(self._main)
        keys = Keys(settings.namespace)
        client = connect(affinity.redis_url, keys.prefix)
        scripts = Scripts(client, keys)
        self._elector = Elector(scripts, self._state, candidate_name(node), settings.leader_ttl)
        self._vacancy: Doorbell | None = Doorbell(client, [keys.queue(self._state, "vacant")])
        self._runs = Runs(scripts, self._state, self._elector)
        self._bound = int(CATCH_UP_TERMS * settings.leader_ttl * 1_000_000)
        self._reachability = Reachability(logger, "periodic tasks")
        self._refused = ""
        self._looks: dict[str, tuple[Any, float]] = {}
        self._behind: set[str] = set()
        self._complained: dict[str, int] = {}
        super().setup_schedule()  # type: ignore[misc]
        affinity.start_scheduling(node)

    def tick(self, *_: Any, **__: Any) -> float:
        """Send what is due if elected, else wait for the election; seconds to the next tick."""
        if self._is_closed:
            # By Celery's handler of SIGTERM, whose SystemExit was lost: it struck in some __del__.
            raise SystemExit
        # The handler resigns: it must not strike where a lock is held that it needs.
        with uninterrupted(self._wake):
            return self._tick()

    def _wake(self) -> None:
        if self._vacancy is not None:
            self._vacancy.ring()

    def _tick(self) -> float:
        assert self._elector is not None
        try:
            wait = self._campaign() if not self._elector.leading else self._lead()
            self._reachability.answered()
            return wait
        except RedisError as error:
            self._elector.concede()
            self._reachability.unanswered(error)
            return RETRY_SECONDS
        except Deposed:
            logger.info(
                "No longer sending periodic tasks: the term is over (not an error).",
                extra={"action": "conceded"},
            )
            self._elector.concede()
            return 0.0
        except ConfigurationError as error:
            if str(error) != self._refused:
                logger.error("Not sending periodic tasks: %s", error, extra={"action": "refused"})
            self._refused = str(error)
            return REFUSED_SECONDS

    def close(self) -> None:
        """Resign, so that another beat takes over at once. May be called by a signal handler."""
        self._is_closed = True
        if self._elector is not None:
            self._resign(self._elector)
            self._affinity.stop_scheduling()
        super().close()  # type: ignore[misc]

    @property
    def info(self) -> str:
        """What ``celery beat`` prints of its scheduler."""
        own = super().info  # type: ignore[misc]
        lines = self._affinity.banner().replace(".>", "    .")
        return f"{own}\n{lines}" if own else lines

    @property
    def _affinity(self) -> Any:
        affinity = getattr(self.app, "celery_affinity", None)
        if affinity is None:
            raise ConfigurationError(
                "`celery beat -S affinity` found no Affinity(app) in this app; add "
                "affinity = Affinity(app, queues=[AffinityQueue(...)]) to the app's module"
            )
        return affinity

    # The election

    def _campaign(self) -> float:
        assert self._elector is not None
        wait = self._elector.claim()
        if self._elector.term is None:
            self._reachability.answered()
            if self._vacancy is not None:
                self._vacancy.wait(min(wait, self.max_interval))
            return 0.0
        self._runs.load()
        self._looks.clear()
        self._behind = self._runs.names
        if hasattr(self, "_initial_read"):
            self._initial_read = True  # django-celery-beat: others have counted runs meanwhile
        logger.info(
            "Sending periodic tasks, term %s.",
            self._elector.term,
            extra={"action": "elected", "term": self._elector.term},
        )
        return 0.0

    def _renew(self) -> None:
        """Before each step that takes time."""
        assert self._elector is not None
        if time.monotonic() >= self._elector.renew_at:
            self._elector.renew()
        if not self._elector.leading:
            raise Deposed

    def _resign(self, elector: Elector) -> None:
        term, fence = elector.term, elector.fence
        elector.concede()
        if self._vacancy is not None:
            self._vacancy.close()
            self._vacancy = None
        if term is not None:
            try:
                # Not over the connections that the interrupted code may be using.
                keys = Keys(self._namespace)
                scripts = Scripts(connect(self._affinity.redis_url, keys.prefix), keys)
                scripts.resign(self._state, fence)
            except RedisError:
                pass  # it cannot be told: the term ends by itself

    # Sending

    def _lead(self) -> float:
        assert self._elector is not None
        self._renew()
        wait = self.max_interval
        entries = list(self.schedule.values())
        for entry in entries:
            wait = min(wait, self._look(entry))
        self._runs.forget_all_but({entry.name for entry in entries}, time.time_ns() // 1000)
        return max(0.0, min(wait, self._elector.renew_at - time.monotonic()))

    def _look(self, entry: Any) -> float:
        """Seconds until the entry is to be looked at again; sends it if it is due."""
        seen, at = self._looks.get(entry.name, (None, 0.0))
        if seen is not entry or time.time() >= at:
            entry, left = self._serve(entry)
            at = time.time() + left
            self._looks[entry.name] = (entry, at)
        return at - time.time()

    def _serve(self, entry: Any) -> tuple[Any, float]:
        name, mark = entry.name, dues.mark(entry.schedule)
        for _ in range(AT_ONCE):
            self._renew()
            if self._runs.unsent(name) is not None:
                with uninterrupted():
                    done, entry = self._send_unsent(entry)
                if not done:
                    return entry, RETRY_SECONDS
            last = self._runs.last(name)
            if last is None:
                self._runs.begin(name, Run(dues.micros(entry.last_run_at), mark))
                continue
            if last.mark != mark:
                self._runs.begin(name, Run(max(dues.now(entry.schedule), last.due + 1), mark))
                continue
            if name in self._behind and dues.micros(entry.last_run_at) < last.due:
                entry = self._advanced(entry)
            self._behind.discard(name)
            entry.last_run_at = dues.moment(last.due).astimezone(self.app.timezone)
            due, left = self._due(entry, last.due)
            if due is None:
                return entry, left
            with uninterrupted():
                self._runs.claim(name, Run(due, mark))
                done, entry = self._send_unsent(entry)
            if not done:
                return entry, RETRY_SECONDS
        return entry, 0.0

    def _send_unsent(self, entry: Any) -> tuple[bool, Any]:
        """Publish the entry's claimed run; false if that has to be tried again."""
        due = self._runs.unsent(entry.name)
        if due is not None:
            if not self._send(entry, due):
                return False, entry
            entry = self._advanced(entry)
        return True, entry

    def _due(self, entry: Any, last: int) -> tuple[int | None, float]:
        """The due time to be sent now, or None and the seconds until it may be asked again."""
        try:
            is_due, left = self.is_due(entry)  # type: ignore[attr-defined]
            if not is_due:
                return None, left if isinstance(left, (int, float)) else self.max_interval
            now = dues.now(entry.schedule)
            due = dues.after(entry.schedule, last)
            if due is not None and due <= last:
                return None, self.max_interval  # it has no later one: a single date
            if due is not None and due < now - self._bound:
                due = dues.latest(entry.schedule, last, now)
        except Exception:
            logger.exception(
                "Cannot tell when periodic entry %r is due; trying again in %g s.",
                entry.name,
                self.max_interval,
                extra={"action": "periodic_unknown", "entry": entry.name},
            )
            return None, self.max_interval
        # The entry's own word counts: a schedule may say that it is due and not since when.
        return (now if due is None or due > now else due), 0.0

    def _send(self, entry: Any, due: int) -> bool:
        """Publish a claimed run; False if that has to be tried again."""
        logger.info(  # in the words of Celery's own
            "Scheduler: Sending due task %s (%s)",
            entry.name,
            entry.task,
            extra={"action": "periodic_send", "entry": entry.name},
        )
        try:
            self.apply_async(  # type: ignore[attr-defined]
                stamped(entry, due, run_id(self._namespace, self._main, entry.name, due)),
                producer=self.producer,  # type: ignore[attr-defined]
                advance=False,
            )
        except Exception as error:
            if self._may_succeed_later(error) and due > dues.now(entry.schedule) - self._bound:
                if self._complained.get(entry.name) != due:
                    self._complained[entry.name] = due
                    logger.warning(
                        "Periodic entry %r is sent later: %s",
                        entry.name,
                        error,
                        extra={"action": "periodic_later", "entry": entry.name},
                    )
                return False
            # As Celery does: this run is lost, the next one is tried again.
            logger.exception(
                "Could not send periodic entry %r, due %s.",
                entry.name,
                dues.moment(due).isoformat(),
                extra={"action": "periodic_failed", "entry": entry.name},
            )
        self._complained.pop(entry.name, None)
        self._runs.confirm(entry.name, due)
        return True

    def _may_succeed_later(self, error: Exception) -> bool:
        """Whether it was the broker, not the entry. Celery raises its own error over the cause."""
        broker = (OperationalError, OSError, RedisError)
        return isinstance(error, broker) or isinstance(error.__context__, broker)

    def _advanced(self, entry: Any) -> Any:
        """Have the scheduler below note a run in its own way: count, time, its store."""
        return self.reserve(entry)  # type: ignore[attr-defined]
