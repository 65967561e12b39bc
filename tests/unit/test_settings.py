"""Laws of the settings: what cannot work is refused, with what to change."""

from __future__ import annotations

import pytest

from celery_affinity import AffinityQueue, ConfigurationError
from celery_affinity.banner import banner
from celery_affinity.resolving import resolve

QUEUE = AffinityQueue("invoices")


def test_the_defaults_are_those_of_the_design() -> None:
    settings, origins = resolve({}, {"queues": (QUEUE,)}, {})
    assert (settings.role, settings.leader_ttl, settings.heartbeat_interval) == ("both", 5, 2)
    assert (settings.heartbeat_timeout, QUEUE.max_batch_size, QUEUE.max_deliveries) == (10, 10, 3)
    assert (QUEUE.pending, QUEUE.state, QUEUE.tag_concurrency) == ("invoices", "invoices", 1)
    assert origins == {"queues": "Affinity(...) queues"}


def test_environment_goes_over_arguments_and_those_over_the_apps_conf() -> None:
    conf = {"role": "worker", "leader_ttl": 3, "namespace": "from-conf"}
    arguments = {"role": "scheduler", "leader_ttl": 4}
    settings, origins = resolve(conf, arguments, {"AFFINITY_ROLE": "both"})
    assert (settings.role, settings.leader_ttl, settings.namespace) == ("both", 4, "from-conf")
    assert origins == {
        "role": "AFFINITY_ROLE",
        "leader_ttl": "Affinity(...) leader_ttl",
        "namespace": "app.conf.affinity_namespace",
    }


def test_queues_can_come_from_the_apps_conf() -> None:
    settings, _ = resolve({"queues": {"invoices": {"max_batch_size": 3}}}, {}, {})
    assert settings.queue("invoices") == AffinityQueue("invoices", max_batch_size=3)


@pytest.mark.parametrize(
    "conf, says",
    [
        ({"hartbeat": 1}, "hartbeat.*known: .*heartbeat_interval"),
        ({"heartbeat_timeout": 2}, "three times"),
        ({"heartbeat_interval": 9}, "raise the former or lower the latter"),
        ({"leader_ttl": 0}, "greater than 0"),
        ({"leader_ttl": 0.5, "queues": (QUEUE,)}, "must not exceed leader_ttl"),
        ({"role": "boss"}, "'scheduler', 'worker' or 'both'"),
        ({"namespace": "a{b}"}, "braces"),
        ({"queues": (QUEUE, QUEUE)}, "share the name 'invoices'"),
        ({"queues": (QUEUE, AffinityQueue("b", state_prefix="invoices"))}, "share the state name"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_what_to_change(conf: dict, says: str) -> None:
    with pytest.raises(ConfigurationError, match=f"(?s){says}"):
        resolve(conf, {}, {})


@pytest.mark.parametrize("value", [0, -1, 1.5, "10", 10**9, True])
def test_a_batch_size_that_is_no_usable_number_is_refused(value: object) -> None:
    with pytest.raises(ConfigurationError, match="max_batch_size"):
        AffinityQueue("q", max_batch_size=value)


@pytest.mark.parametrize("name", ["", "a\nb", "a\x06\x16b", 'a"b', "a\\b", "x" * 201])
def test_a_queue_name_that_would_break_keys_or_messages_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot be a name"):
        AffinityQueue(name)


@pytest.mark.parametrize("name", ["a b", "{x}", "*", "zürich", "a:b:c", "x" * 200])
def test_odd_queue_names_are_taken(name: str) -> None:
    assert AffinityQueue(name).state == name


def test_an_unknown_setting_of_a_queue_names_the_known_ones() -> None:
    with pytest.raises(
        ConfigurationError,
        match=r"batch_size.*did you mean 'max_batch_size'.*known: .*max_batch_size",
    ):
        AffinityQueue("q", batch_size=3)


@pytest.mark.parametrize(
    "ordered, milliseconds", [(False, 0), (True, 300_000), (60, 60_000), (1, 1_000), (0.5, 500)]
)
def test_ordered_retries_is_a_yes_or_a_bound(ordered: float, milliseconds: int) -> None:
    assert AffinityQueue("q", ordered_retries=ordered).limits["ordered"] == milliseconds


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"on_lost": "retry"}, "on_lost"),
        ({"untagged": "ignore"}, "untagged"),
        ({"ordered_retries": -1}, "ordered_retries"),
        ({"warm_wait": -1}, "warm_wait"),
        ({"shards": 2, "slots": 1}, "slots .1. and shards .2. do not go together"),
        ({"warm_wait": 1, "warm_tags": 0}, "warm_wait .1 s. needs warm_tags above 0"),
        ({"max_batch_seconds": 0}, "max_batch_seconds"),
    ],
)
def test_a_setting_of_a_queue_that_cannot_be_meant_is_refused(
    settings: dict[str, object], says: str
) -> None:
    with pytest.raises(ConfigurationError, match=says):
        AffinityQueue("q", **settings)


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValueError, match="frozen"):
        QUEUE.max_batch_size = 3  # type: ignore[misc]


def test_a_name_in_the_environment_that_is_nearly_a_settings_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="did you mean AFFINITY_LEADER_TTL"):
        resolve({}, {}, {"AFFINITY_LEADER_TLL": "3"})
    resolve({}, {}, {"AFFINITY_MASK": "3", "AFFINITY_TEST_BROKER": "x"})


def test_the_command_line_goes_over_the_environment() -> None:
    settings, origins = resolve({}, {}, {"AFFINITY_ROLE": "both"}, {"role": "worker"})
    assert (settings.role, origins) == ("worker", {"role": "--affinity-role"})


def test_a_wrong_value_names_where_it_comes_from() -> None:
    for sources, origin in (
        (({"role": "boss"}, {}, {}), "app.conf.affinity_role"),
        (({}, {"role": "boss"}, {}), r"Affinity\(...\) role"),
        (({}, {}, {"AFFINITY_ROLE": "boss"}), "AFFINITY_ROLE"),
        (({}, {}, {}, {"role": "boss"}), "--affinity-role"),
        (({"role": "boss"}, {}, {}, {}, {"role": "settings.X_ROLE"}), "settings.X_ROLE"),
    ):
        with pytest.raises(ConfigurationError, match=f"role \\(from {origin}\\).*'boss'"):
            resolve(*sources)


def test_contradictory_times_name_where_they_come_from() -> None:
    with pytest.raises(ConfigurationError) as error:
        resolve({"namespace": "n"}, {"heartbeat_interval": 2}, {"AFFINITY_HEARTBEAT_TIMEOUT": "3"})
    said = str(error.value)
    assert "heartbeat_interval is from Affinity(...) heartbeat_interval" in said
    assert "heartbeat_timeout is from AFFINITY_HEARTBEAT_TIMEOUT" in said
    assert "namespace" not in said


@pytest.mark.parametrize(
    "queues, says",
    [
        ({"invoices": 3}, "found 'invoices': 3, expected a queue's name and its settings"),
        ({3: {}}, "found 3"),
        ({"invoices": {"batch": 3}}, "batch: there is no such setting"),
        ({"invoices": {"max_batch_size": 0}}, "max_batch_size: .*found 0"),
        ({"invoices": {"name": "other"}}, "multiple values for argument 'name'"),
        (["invoices"], "valid dictionary.*found 'invoices'"),
    ],
)
def test_a_wrong_queue_of_the_apps_conf_names_the_setting(queues: object, says: str) -> None:
    with pytest.raises(ConfigurationError, match=f"(?s)settings.CELERY_AFFINITY_QUEUES.*{says}"):
        resolve({"queues": queues}, {}, {}, {}, {"queues": "settings.CELERY_AFFINITY_QUEUES"})


def test_queues_in_the_environment_are_refused_instead_of_ignored() -> None:
    with pytest.raises(ConfigurationError, match="AFFINITY_QUEUES.*remove it"):
        resolve({}, {}, {"AFFINITY_QUEUES": "invoices"})


def test_the_banner_shows_each_setting_that_is_no_default_with_its_origin_and_no_password() -> None:
    settings, origins = resolve(
        {"queues": {"invoices": {"max_batch_size": 3}, "mails": {}}, "leader_ttl": 3},
        {"redis_url": "redis://:secret@host/0"},
        {"AFFINITY_NAMESPACE": "shop"},
        {"role": "worker"},
    )
    assert banner(settings, origins).splitlines() == [
        ".> queues: invoices(max_batch_size=3), mails (app.conf.affinity_queues)",
        ".> leader_ttl: 3.0 (app.conf.affinity_leader_ttl)",
        ".> redis_url: redis://:**@host/0 (Affinity(...) redis_url)",
        ".> namespace: shop (AFFINITY_NAMESPACE)",
        ".> role: worker (--affinity-role)",
    ]
    assert banner(*resolve({}, {}, {})) == ".> queues: (none)"
