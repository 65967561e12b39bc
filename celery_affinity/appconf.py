"""An app's ``affinity_*`` settings, each with the name under which the user wrote it."""

from __future__ import annotations

from types import ModuleType
from typing import Any

__all__ = ("affinity_conf",)


def affinity_conf(app: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Read them; this configures the app if it is not yet.

    They are written as Celery's own settings are: ``affinity_role`` (``AFFINITY_ROLE`` and
    ``CELERY_AFFINITY_ROLE`` too), or with the namespace of `config_from_object`, such as
    ``CELERY_AFFINITY_ROLE`` in Django's settings. What is set on `app.conf` goes before those.

    Returns:
        The values by setting, unknown ones among them, and where each was found.
    """
    conf = app.conf
    conf.finalize()
    namespace = app.namespace.rstrip("_") if app.namespace else ""
    values: dict[str, Any] = {}
    written: dict[str, str] = {}
    for source in reversed(conf.maps[:-1]):  # without Celery's defaults; the strongest is first
        for name in sorted(name for name in source.keys() if isinstance(name, str)):
            setting = _setting(name, namespace)
            if setting is None:
                continue
            value = source[name]
            if value is None or callable(value) or isinstance(value, ModuleType):
                continue  # not given; or an import of the settings' module, such as affinity_task
            values[setting] = value
            written[setting] = f"settings.{name}" if name.isupper() else f"app.conf.{name}"
    return values, written


def _setting(name: str, namespace: str) -> str | None:
    own = f"{namespace.upper()}_AFFINITY_"
    for prefix in (own,) if namespace else ("AFFINITY_", "CELERY_AFFINITY_"):
        if name.upper().startswith(prefix):
            return name[len(prefix) :].lower()
    # Celery takes a setting without its namespace too, if that is in lower case.
    return name[len("affinity_") :] if name.startswith("affinity_") else None
