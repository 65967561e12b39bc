"""What is exported to Prometheus: names, help, and how they are served.

Labels are the queue's name, and for the longest backlogs, where they are asked for, the tag: never
more than `MAX_TOP_TAGS` of them at a time. Needs prometheus-client (the extra "prometheus").
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from redis.exceptions import RedisError

from celery_affinity.connection import Reachability
from celery_affinity.measures import QueueMeasures

__all__ = ("MAX_TOP_TAGS", "LedgerCollector", "MetricsServer")

logger = logging.getLogger(__name__)

PREFIX = "celery_affinity_"
#: Most tags that are shown by name.
MAX_TOP_TAGS = 100
#: Seconds after which a port that was taken is tried again.
BIND_SECONDS = 5.0

#: Gauges of a queue: name, help, value (None: it is not shown).
GAUGES: tuple[tuple[str, str, Callable[[QueueMeasures], float | None]], ...] = (
    ("pending_messages", "Sent, and not yet taken in; none if a broker elsewhere does not answer.",
        lambda m: m.stats.pending),
    ("entries", "Taken in and not ended: they wait or run.", lambda m: m.stats.entries),
    ("scheduled_entries", "Due later.", lambda m: m.stats.scheduled),
    ("ready_tags", "Tags that wait for a slot.", lambda m: m.stats.ready_tags),
    ("held_tags", "Tags that hold a slot.", lambda m: m.stats.held_tags),
    ("halted_tags", "Tags that wait for an operator.", lambda m: m.stats.halted_tags),
    ("oldest_wait_seconds", "Since when the first ready tag waits.", lambda m: m.oldest_wait),
    ("dead_letters", "Buried messages that are kept.", lambda m: m.stats.dead),
    ("stopped", "1 if it is evacuated or paused.", lambda m: m.stopped),
    ("leader", "1 if somebody schedules it.", lambda m: m.term is not None),
    ("leader_term", "Number of the leader's term, 0 without one.", lambda m: m.term or 0),
    ("active_leases", "Slots that hold a tag of this queue.", lambda m: m.leases),
    ("idle_slots", "Free slots that serve it.", lambda m: m.stats.idle_slots),
    ("startable_tasks", "Tasks that free slots could start now.", lambda m: m.startable),
    ("slots_wanted", "Slots that would all have work now.", lambda m: m.slots_wanted),
    ("workers", "Workers that serve it and take work.", lambda m: m.workers),
    ("workers_needed", "Workers with as many slots as are wanted.", lambda m: m.workers_needed),
)  # fmt: skip

#: Counters of a queue, since its ledger began: name, help, the ledger's counter.
COUNTERS = (
    ("admitted_tasks", "Taken in.", "admitted"),
    ("settled_tasks", "Ended, those that ask for a retry counted.", "settled"),
    ("leases", "Leases opened: a slot got a tag.", "leases"),
    ("warm_leases", "Of them in the slot that had the tag last.", "warm"),
    ("moved_leases", "Of them in another slot than the tag's last.", "moved"),
    ("requeued_tasks", "Given back to the head of their tag.", "requeued"),
    ("rescued_tasks", "Taken back from lost workers.", "rescued"),
    ("resent_messages", "Sent again, as they did not arrive.", "resent"),
    ("refused_copies", "Copies that were not allowed to run.", "refused"),
    ("buried_tasks", "Put into the dead letters.", "buried"),
)

#: Reads the figures, with so many of the longest backlogs of each queue.
Read = Callable[[int], Sequence[QueueMeasures]]


class LedgerCollector(Collector):
    """Gives a registry the figures of the moment in which it is asked.

    Arguments:
        read: Reads them.
        top_tags: So many of the longest backlogs are shown by the name of their tag.
    """

    def __init__(self, read: Read, top_tags: int = 0) -> None:
        if not 0 <= top_tags <= MAX_TOP_TAGS:
            raise ValueError(f"top_tags is {top_tags}, expected 0 to {MAX_TOP_TAGS}")
        self._read = read
        self._top_tags = top_tags
        self._reachability = Reachability(logger, "metrics")

    def describe(self) -> Iterable[Metric]:
        """Nothing: a registry need not ask Redis when this is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Read the ledger; without an answer there is only ``celery_affinity_up 0``."""
        try:
            found = self._read(self._top_tags)
            self._reachability.answered()
        except RedisError as error:
            self._reachability.unanswered(error)
            found = None
        up = GaugeMetricFamily(PREFIX + "up", "1 if the ledger's Redis answers.")
        up.add_metric([], float(found is not None))
        yield up
        if found is not None:
            yield from families(found, self._top_tags > 0)


def families(found: Sequence[QueueMeasures], top: bool) -> Iterator[Metric]:
    """The metrics of these figures; `top`: with those of single tags."""
    for name, text, value in GAUGES:
        gauge = GaugeMetricFamily(PREFIX + name, text, labels=["queue"])
        for one in found:
            if (known := value(one)) is not None:
                gauge.add_metric([one.stats.queue], float(known))
        yield gauge
    for name, text, counter in COUNTERS:
        total = CounterMetricFamily(PREFIX + name, text, labels=["queue"])
        for one in found:
            total.add_metric([one.stats.queue], one.totals[counter])
        yield total
    waits = HistogramMetricFamily(
        PREFIX + "start_latency_seconds",
        "From joining the backlog to the first start, of one task in ten.",
        labels=["queue"],
    )
    for one in found:
        buckets = [("+Inf" if b == float("inf") else repr(b), float(n)) for b, n in one.waits]
        waits.add_metric([one.stats.queue], buckets, one.waited)
    yield waits
    if top:
        tags = GaugeMetricFamily(
            PREFIX + "tag_waiting", "The longest backlogs.", labels=["queue", "tag"]
        )
        for one in found:
            for record in one.top:
                tags.add_metric([one.stats.queue, record.tag], record.waiting)
        yield tags


class MetricsServer:
    """Serves a collector's figures on a port, from a thread, until `stop`.

    A port that is taken is tried again: the process before may be about to end.

    Does not: end the process if it cannot serve.
    """

    def __init__(self, collector: Collector, port: int, address: str = "0.0.0.0") -> None:
        self._registry = CollectorRegistry()
        self._registry.register(collector)
        self._at = address, port
        self._stopping = threading.Event()
        self._served: tuple[Any, threading.Thread] | None = None

    def start(self) -> None:
        """Serve soon."""
        threading.Thread(target=self._bind, name="affinity-metrics", daemon=True).start()

    def stop(self) -> None:
        """Serve no more."""
        self._stopping.set()
        if self._served is not None:
            server, thread = self._served
            server.shutdown()
            server.server_close()
            thread.join(1.0)

    @property
    def port(self) -> int:
        """The port that it listens on; the one that it was given before it does."""
        return int(self._served[0].server_port) if self._served else self._at[1]

    def serve(self) -> None:
        """Serve from now on.

        Raises:
            OSError: If the port cannot be had.
        """
        address, port = self._at
        self._served = start_http_server(port, address, self._registry)

    def _bind(self) -> None:
        complained = False
        while not self._stopping.is_set():
            try:
                return self.serve()
            except OSError as error:
                if not complained:
                    logger.warning(
                        "Cannot serve metrics on %s:%d (%s); trying again every %g s.",
                        *self._at,
                        error,
                        BIND_SECONDS,
                        extra={"action": "metrics_port", "port": self._at[1]},
                    )
                complained = True
                self._stopping.wait(BIND_SECONDS)
