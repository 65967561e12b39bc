"""Looks for what is set up wrongly: Redis, the app's settings, its workers, others in their way.

For people: it tells what it found and what to do. Probes ask `alive`, dashboards `status`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from redis import Redis
from redis.exceptions import RedisError, ResponseError

from celery_affinity.bound import Bound
from celery_affinity.broker import OutOfSight
from celery_affinity.choosing import broker_kind
from celery_affinity.connection import connect
from celery_affinity.exceptions import ConfigurationError, ShardsError
from celery_affinity.foreign import consumed_queues
from celery_affinity.keys import Keys
from celery_affinity.resharding import refuse_other_shards
from celery_affinity.scripts import SCHEMA_VERSION
from celery_affinity.server_checks import (
    MINIMUM_VERSION,
    refusal_of_cluster,
    too_short_a_timeout,
)
from celery_affinity.settings import AffinityQueue
from celery_affinity.types import Finding

__all__ = ("examine",)

#: How long workers have to say what they consume.
ANSWER_SECONDS = 1.0
#: A difference of clocks above this is worth a word: due times are told by producers' clocks.
CLOCK_SECONDS = 1.0


def examine(bound: Bound) -> list[Finding]:
    """All findings, in the order in which one would mend them."""
    shards = range(bound.settings.shards)
    keys = [Keys(bound.settings.namespace, shard) for shard in shards]
    clients = [connect(bound.redis_url, one.prefix, socket_timeout=3.0) for one in keys]
    findings = [_versions()]
    servers: dict[str, _Server] = {}
    for shard, client in enumerate(clients):
        try:
            info = client.info()
        except RedisError as error:
            about = "Redis" if len(clients) == 1 else f"Redis of shard {shard}"
            found = f"does not tell what it is ({error})"
            fix = "start it, mend redis_url or the broker's URL, or allow its user INFO (ACL +info)"
            return [*findings, Finding(about, "error", found, fix)]
        if refused := refusal_of_cluster(client, info):
            found = "a node of a cluster, used as if it were alone"
            return [*findings, Finding("Redis", "error", found, refused)]
        servers.setdefault(info["run_id"], _Server(client, info, [])).shards.append(shard)
    try:
        _ = bound.delivery
    except ConfigurationError as error:
        return [*findings, Finding("broker", "error", "Celery cannot use it", str(error))]
    examinations: list[Callable[[], Iterable[Finding]]] = [
        lambda: _servers(list(servers.values()), bound.settings.heartbeat_timeout),
        lambda: _ledgers(clients, keys),
        lambda: _settings(bound),
        lambda: _workers(bound),
        lambda: _broker(bound),
    ]
    for queue in bound.settings.queues:
        examinations.append(lambda queue=queue: _queue(bound, clients, queue))  # type: ignore[misc]
    for examination in examinations:
        findings.extend(examination())
    return findings


class _Server(NamedTuple):
    """A Redis, and the shards whose ledgers it has."""

    client: Redis
    info: dict[str, Any]
    shards: list[int]


def _versions() -> Finding:
    names = ("celery-affinity", "celery", "kombu", "redis")
    return Finding("versions", "ok", ", ".join(f"{name} {version(name)}" for name in names))


def _servers(servers: Sequence[_Server], heartbeat_timeout: float) -> Iterator[Finding]:
    for client, info, shards in servers:
        of = "" if len(servers) == 1 else f" ({_shards(shards)})"
        short = too_short_a_timeout(client, heartbeat_timeout)
        failover = [Finding("heartbeat_timeout", "error", *short)] if short else []
        for finding in (*_server(client, info), *_clock(client), *failover):
            yield replace(finding, about=finding.about + of)


def _shards(shards: Sequence[int]) -> str:
    return f"shard{'s' if len(shards) > 1 else ''} {', '.join(map(str, shards))}"


def _server(client: Redis, info: dict[str, Any]) -> Iterator[Finding]:
    found = str(info["redis_version"])
    wanted = ".".join(map(str, MINIMUM_VERSION))
    if tuple(int(part) for part in found.split(".")[:2]) < MINIMUM_VERSION:
        yield Finding("Redis version", "error", found, f"upgrade the server to {wanted} or newer")
    else:
        yield Finding("Redis version", "ok", found)
    policy = str(info.get("maxmemory_policy", "noeviction"))
    if policy == "noeviction":
        yield Finding("Redis eviction", "ok", policy)
    else:
        evicts = int(info.get("maxmemory", 0)) and policy.startswith("allkeys")
        fix = "CONFIG SET maxmemory-policy noeviction (it drops tasks when memory is full)"
        yield Finding("Redis eviction", "error" if evicts else "warning", policy, fix)
    if info.get("aof_enabled"):
        yield Finding("Redis persistence", "ok", "appendonly yes")
    else:
        fix = "CONFIG SET appendonly yes, or its restart loses what came since the last snapshot"
        yield Finding("Redis persistence", "warning", "appendonly no", fix)
    if int(info.get("connected_slaves", 0)):
        text = f"{info['connected_slaves']} replicas, written to asynchronously"
        fix = "a failover may lose the latest writes: WAIT or min-replicas-to-write bound how many"
        yield Finding("Redis replication", "warning", text, fix)


def _clock(client: Redis) -> Iterator[Finding]:
    began = time.time()
    seconds, micros = client.time()
    here = (began + time.time()) / 2
    ahead = seconds + micros / 1e6 - here
    text = f"Redis is {ahead:+.2f} s ahead of this machine"
    if abs(ahead) > CLOCK_SECONDS:
        fix = "set both by NTP: tasks with an ETA would run that much early or late"
        yield Finding("clock", "warning", text, fix)
    else:
        yield Finding("clock", "ok", text)


def _ledgers(clients: Sequence[Redis], keys: Sequence[Keys]) -> Iterator[Finding]:
    text = f"namespace {keys[0].namespace!r}, schema {SCHEMA_VERSION}"
    for client, own in zip(clients, keys, strict=True):
        found: Any = client.get(own.prefix + "schema")
        if found is not None and found.decode() != SCHEMA_VERSION:
            fix = "run the version that wrote it until it is empty, or choose another namespace"
            yield Finding("ledger", "error", f"schema {found.decode()}, not {SCHEMA_VERSION}", fix)
            return
    yield Finding("ledger", "ok", text if len(keys) == 1 else f"{text}, {len(keys)} shards")


def _settings(bound: Bound) -> Iterator[Finding]:
    conf = bound.app.conf
    backend = urlsplit(str(conf.result_backend or "")).scheme
    if backend.startswith("redis") and not conf.get("result_backend_always_retry"):
        fix = "result_backend_always_retry = True, or results are lost while Redis restarts"
        yield Finding("result backend", "warning", f"{backend}, does not wait for Redis", fix)
    if str(conf.broker_url).startswith("rediss") and not _says_tls(conf):
        fix = 'broker_use_ssl = {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_ca_certs": "<file>"}'
        yield Finding("broker TLS", "warning", "Celery does not check its certificate", fix)
    options = conf.broker_transport_options or {}
    if broker_kind(bound.app) == "amqp" and not options.get("confirm_publish"):
        text = "publishes are not confirmed: RabbitMQ may lose a task whose publish has returned"
        fix = 'broker_transport_options = {"confirm_publish": True}, in producers too'
        yield Finding("broker confirms", "warning", text, fix)
    names = {name for queue in bound.settings.queues for name in (queue.name, queue.pending)}
    if (default := str(conf.task_default_queue)) in names:
        fix = "give task_default_queue another name: plain tasks would be sent there, without a tag"
        yield Finding("names", "warning", f"the app's default queue is {default!r}", fix)


def _says_tls(conf: Any) -> bool:
    """Whether kombu is told what to check; it checks nothing else."""
    return bool(conf.broker_use_ssl) or "ssl_cert_reqs=" in str(conf.broker_url)


def _workers(bound: Bound) -> Iterator[Finding]:
    workers = bound._ledger.workers(bound.settings.queues)
    declared = set(bound.settings.queue_names)
    names = [worker.name for worker in workers]
    for name in sorted({name for name in names if names.count(name) > 1}):
        fix = "give each worker its own -n name; a killed one's record goes by itself"
        yield Finding("worker names", "warning", f"{names.count(name)} workers are {name!r}", fix)
    for worker in workers:
        if unknown := sorted(set(worker.queues) - declared):
            text = f"{worker.name!r} serves {unknown[0]!r}, which this app does not declare"
            fix = "declare it here, or give each app a namespace of its own"
            yield Finding("namespace", "warning", text, fix)
        if worker.heartbeat_left_seconds < 0:
            text = f"{worker.name!r} is overdue by {-worker.heartbeat_left_seconds:.1f} s"
            fix = "look at its machine; a scheduler gives what it held to others"
            yield Finding("heartbeat", "error", text, fix)
    yield from _timeouts(bound, [worker.worker_id for worker in workers])


def _timeouts(bound: Bound, incarnations: list[str]) -> Iterator[Finding]:
    client, own = bound._scripts.client, int(bound.settings.heartbeat_timeout * 1000)
    for incarnation in incarnations:
        key = bound._scripts.keys.worker(incarnation, "info")
        found: Any = client.hmget(key, ["name", "timeout"])
        name, timeout = found
        if name is not None and int(timeout or own) != own:
            text = f"{name.decode()!r} has {int(timeout) / 1000:g} s, this app {own / 1000:g} s"
            fix = "deploy the same settings everywhere, and start that worker anew"
            yield Finding("heartbeat_timeout", "warning", text, fix)


def _broker(bound: Bound) -> Iterator[Finding]:
    """A broker elsewhere, and then who consumes from it: nobody can be asked while it is away."""
    if bound.delivery.lookout is not None:
        for queue in bound.settings.queues:
            try:
                waiting = bound.delivery.lookout.waiting(queue.pending)
            except OutOfSight as error:
                fix = "start it, or mend its URL; foreign consumers were not looked for"
                yield Finding("broker", "error", str(error), fix)
                return
            yield Finding("broker", "ok", f"answers; {waiting} messages wait in {queue.pending!r}")
    yield from _strangers(bound)


def _strangers(bound: Bound) -> Iterator[Finding]:
    pending = {name for queue in bound.settings.queues for name in (queue.name, queue.pending)}
    answers = consumed_queues(bound.app, ANSWER_SECONDS) or {}
    strangers = sorted(
        {
            (node, str(queue.get("name")))
            for node, queues in answers.items()
            for queue in queues
            if queue.get("name") in pending
        }
    )
    for node, queue in strangers:
        text = f"{node!r} consumes {queue!r} past the ledger"
        fix = "stop it, or give its app Affinity(app, ...) and start it anew"
        yield Finding("foreign consumers", "error", text, fix)
    if not strangers:
        text = f"none among the {len(answers)} workers that answered"
        yield Finding("foreign consumers", "ok", text)


def _queue(bound: Bound, clients: Sequence[Redis], queue: AffinityQueue) -> Iterator[Finding]:
    about = f"queue {queue.name!r}"
    for part in queue.parts:
        for name in bound.delivery.pending_lists(part):
            kind: Any = clients[part.shard].type(name)
            if kind not in (b"list", b"none"):
                fix = "give the queue a pending_queue_name that nothing else uses"
                yield Finding(about, "error", f"its key {name!r} is a {kind.decode()}", fix)
    try:
        refuse_other_shards(queue, bound._shards.scripts)
    except ShardsError as error:
        yield Finding(about, "error", "its shards are others than the ledger's", str(error))
        return
    leaders = bound._ledger.leaders(queue)
    vacant = [shard for shard, leader in enumerate(leaders) if leader is None]
    if vacant:
        fix = "start `celery -A <app> beat -S affinity`, or a worker with role both"
        what = "it" if queue.shards == 1 else f"{_shards(vacant)} of it"
        yield Finding(about, "error", f"nobody schedules {what}", fix)
    serving = [
        worker
        for worker in bound._ledger.workers(bound.settings.queues)
        if queue.name in worker.queues and not worker.draining
    ]
    if not serving:
        fix = f"start `celery -A <app> worker -Q {queue.name}`"
        yield Finding(about, "error", "no worker serves it", fix)
    for part in queue.parts:
        yield from _limits(bound, clients[part.shard], part)
    if not vacant and serving:
        names = dict.fromkeys(leader.leader.split("/")[0] for leader in leaders if leader)
        text = f"scheduled by {', '.join(names)}, {len(serving)} workers"
        yield Finding(about, "ok", text)


def _limits(bound: Bound, client: Redis, part: AffinityQueue) -> Iterator[Finding]:
    key = bound._shards.scripts(part.shard).keys.queue(part.state, "conf")
    about = f"queue {part.name!r}" + (f" (shard {part.shard})" if part.shards > 1 else "")
    try:
        found: Any = client.hmget(key, list(part.limits))
    except ResponseError as error:
        yield Finding(about, "error", str(error), "choose another namespace")
        return
    for (name, own), other in zip(part.limits.items(), found, strict=True):
        if other is not None and int(other) != own:
            text = f"its leader goes by {name} {int(other)}, this app declares {own}"
            fix = "deploy the same settings everywhere; the leader takes them from its own app"
            yield Finding(about, "warning", text, fix)
