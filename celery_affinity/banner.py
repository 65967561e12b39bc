"""What a node prints of its settings at its start."""

from __future__ import annotations

from collections.abc import Mapping

from celery_affinity.address import masked
from celery_affinity.settings import AffinityQueue, AffinitySettings

__all__ = ("banner",)


def banner(settings: AffinitySettings, origins: Mapping[str, str]) -> str:
    """The queues, then each setting that is not a default, a line each, with its origin."""
    queues = ", ".join(_queue(queue) for queue in settings.queues) or "(none)"
    lines = [f".> queues: {queues}{_from(origins, 'queues')}"]
    for name in origins:
        if name != "queues":
            value = masked(str(getattr(settings, name)))
            lines.append(f".> {name}: {value}{_from(origins, name)}")
    return "\n".join(lines)


def _from(origins: Mapping[str, str], name: str) -> str:
    return f" ({origins[name]})" if name in origins else ""


def _queue(queue: AffinityQueue) -> str:
    own = queue.model_dump(exclude_defaults=True, exclude={"name"})
    described = ", ".join(f"{name}={value}" for name, value in own.items())
    return f"{queue.name}({described})" if described else queue.name
