"""Where settings come from: one value of each, with the place that it was set in."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from celery_affinity.exceptions import ConfigurationError
from celery_affinity.settings import AffinityQueue, AffinitySettings, explain_problems

__all__ = ("resolve",)


def _refuse_typos(environ: Mapping[str, str]) -> None:
    """Other programs may use AFFINITY_ names; one that is nearly a setting's is a mistake."""
    known = [f"AFFINITY_{name.upper()}" for name in AffinitySettings.model_fields]
    for name in environ:
        if not name.startswith("AFFINITY_") or name in known:
            continue
        if near := get_close_matches(name, known, n=1, cutoff=0.85):
            raise ConfigurationError(
                f"the environment has {name}, which is no setting of celery_affinity; "
                f"did you mean {near[0]}?"
            )


def _refuse_queues(environ: Mapping[str, str]) -> None:
    if "AFFINITY_QUEUES" in environ:
        raise ConfigurationError(
            "the environment has AFFINITY_QUEUES, but queues are declared by "
            "Affinity(app, queues=[...]) or by affinity_queues in the app's settings: remove it"
        )


def _queues(value: Any, origin: str) -> Any:
    if not isinstance(value, Mapping):
        return value
    found = []
    for name, options in value.items():
        if not isinstance(name, str) or not isinstance(options, Mapping):
            raise ConfigurationError(
                f"{origin} cannot be used: found {name!r}: {options!r:.80}, expected a queue's "
                f'name and its settings, such as {{"invoices": {{"max_batch_size": 10}}}}'
            )
        try:
            found.append(AffinityQueue(name, **options))
        except (ConfigurationError, TypeError) as error:
            raise ConfigurationError(f"{origin}: {error}") from None
    return tuple(found)


def resolve(
    conf: Mapping[str, Any],
    arguments: Mapping[str, Any],
    environ: Mapping[str, str] | None = None,
    command_line: Mapping[str, Any] | None = None,
    written: Mapping[str, str] | None = None,
) -> tuple[AffinitySettings, dict[str, str]]:
    """Merge the sources: command line over environment over arguments over ``app.conf``.

    Arguments:
        conf: The app's ``affinity_*`` settings, without the prefix.
        arguments: What ``Affinity(app, ...)`` was given.
        environ: Environment; ``AFFINITY_<NAME>`` sets ``<name>``.
        command_line: What ``--affinity-<name>`` was given.
        written: For settings of `conf`, where the user wrote them; ``app.conf.affinity_<name>``.

    Returns:
        The settings, and for each that is not a default where it came from.

    Raises:
        ConfigurationError: For unknown names, values out of range, contradictory times.
    """
    environ = os.environ if environ is None else environ
    _refuse_typos(environ)
    _refuse_queues(environ)
    in_environment = {
        name: environ[f"AFFINITY_{name.upper()}"]
        for name in AffinitySettings.model_fields
        if f"AFFINITY_{name.upper()}" in environ
    }
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    sources: list[tuple[Mapping[str, Any], Callable[[str], str]]] = [
        (conf, lambda name: (written or {}).get(name, f"app.conf.affinity_{name}")),
        (arguments, lambda name: f"Affinity(...) {name}"),
        (in_environment, lambda name: f"AFFINITY_{name.upper()}"),
        (command_line or {}, lambda name: f"--affinity-{name.replace('_', '-')}"),
    ]
    for found, origin_of in sources:
        for name, value in found.items():
            values[name], origins[name] = value, origin_of(name)
    if "queues" in values:
        values["queues"] = _queues(values["queues"], origins["queues"])
    try:
        return AffinitySettings(**values), origins
    except ValidationError as error:
        raise ConfigurationError(
            explain_problems(AffinitySettings, "the settings of celery_affinity", error, origins)
        ) from None
