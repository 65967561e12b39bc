"""The scheduling beat service: ``celery -A app beat -S affinity``.

It sends the app's periodic tasks as Celery's own scheduler does, and beside that campaigns for
the affinity queues, in threads. So a slow publish does not hold up scheduling.
"""

from __future__ import annotations

from typing import Any

from celery.beat import PersistentScheduler
from celery.utils.log import get_logger
from celery.utils.nodenames import gethostname

from celery_affinity.exceptions import ConfigurationError

__all__ = ("AffinityScheduler",)

logger = get_logger(__name__)


class AffinityScheduler(PersistentScheduler):  # type: ignore[misc]
    """Celery's persistent scheduler, with the schedulers of the affinity queues beside it."""

    def setup_schedule(self) -> None:
        """Called once, in the process that runs; not for introspection."""
        affinity = self._affinity
        super().setup_schedule()
        affinity.start_scheduling(f"beat@{gethostname()}")

    def close(self) -> None:
        """Resign, so that another node takes over at once."""
        self._affinity.stop_scheduling()
        super().close()

    @property
    def info(self) -> str:
        """What ``celery beat`` prints of its scheduler."""
        lines = self._affinity.banner().replace(".>", "    .")
        return f"{super().info}\n{lines}"

    @property
    def _affinity(self) -> Any:
        affinity = getattr(self.app, "celery_affinity", None)
        if affinity is None:
            raise ConfigurationError(
                "`celery beat -S affinity` found no Affinity(app) in this app; add "
                "affinity = Affinity(app, queues=[AffinityQueue(...)]) to the app's module"
            )
        return affinity
