"""Laws of Flower: what it shows of affinity queues, with real workers and a real Flower."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tornado.web import create_signed_value

from acceptance.flower_shop import APP, USER, Shop, running_shop, start_flower
from acceptance.support import wait_for_nodes
from celery_affinity.embedded import Server
from harness import Cluster, wait_until

pytestmark = pytest.mark.acceptance


@pytest.fixture(scope="module")
def shop(server_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    with running_shop(tmp_path_factory.mktemp("flower")) as shop:
        yield shop


def held(slots: list[dict[str, Any]]) -> list[tuple[str, int, str]]:
    """Tag, batch and status of the slots that have one."""
    return [
        (slot["current_identify_tag"], slot["current_batch_size"], slot["status"])
        for slot in slots if "current_identify_tag" in slot
    ]


def test_each_part_fits_the_flower_that_is_installed(shop: Shop) -> None:
    assert "not as expected" not in shop.site.node.log_text()
    assert "was checked with" not in shop.site.node.log_text()


def test_inspect_affinity_tells_slots_tag_and_batch_of_a_worker(shop: Shop) -> None:
    (task, *_) = shop.hold("asked", 3)

    def asked() -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-m", "celery", "-A", APP, "inspect", "--json", "-t", "2", "affinity"],
            env=shop.cluster.environ, capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        return dict(json.loads(done.stdout))

    replies = asked()
    assert set(replies) == {"w1@test", "w2@test"}
    slots = [slot for reply in replies.values() for slot in reply["slots"]]
    assert [slot["index"] for slot in slots] == [0, 1, 0, 1]
    assert held(slots) == [("asked", 1, "running")]
    (slot,) = [slot for slot in slots if slot["status"] == "running"]
    hold = shop.affinity.explain("asked").holds[0]
    assert (slot["queue"], slot["index"], slot["epoch"]) == ("jobs", hold.slot, hold.epoch)
    assert (slot["task"], slot["task_id"]) == ("jobs.gated", task.id)
    assert {(reply["role"], *reply["queues"]) for reply in replies.values()} == {("both", "jobs")}
    shop.open("asked")
    shop.quiet()
    wait_until(
        lambda: not held([slot for reply in asked().values() for slot in reply["slots"]]),
        what="idle slots",
    )


def test_flower_s_api_and_worker_page_show_slots_tag_and_batch(shop: Shop) -> None:
    shop.hold("seen", 2)
    holder = shop.affinity.explain("seen").holds[0].worker

    def told() -> list[tuple[str, int, str]]:
        workers = shop.site.json("/api/workers?refresh=1")
        return held(workers.get(holder, {}).get("stats", {}).get("affinity", {}).get("slots", []))

    wait_until(lambda: told() == [("seen", 1, "running")], what="the slot in Flower's API")
    status, page, _ = shop.site.ask(f"/worker/{holder}", Authorization=USER)
    assert status == 200
    assert "current_identify_tag" in page and "seen" in page
    shop.open("seen")
    shop.quiet()


def test_tasks_show_their_tag_in_flower_s_table_page_and_api(shop: Shop) -> None:
    shop.open("tagged")
    (task,) = shop.producer.send("tagged", task="gated")
    found = wait_until(
        lambda: next((t for t in shop.site.json("/api/tasks").values() if t["uuid"] == task.id), None),
        what="the task in Flower",
    )  # fmt: skip
    assert found["identify_tag"] == "tagged"
    assert shop.site.json(f"/api/task/info/{task.id}")["identify_tag"] == "tagged"
    _, page, _ = shop.site.ask(f"/task/{task.id}", Authorization=USER)
    assert re.search(r"<dt>Identify tag</dt>\s*<dd>\s*tagged\s*</dd>", page)
    _, table, _ = shop.site.ask("/tasks", Authorization=USER)
    assert '<th data-column="identify_tag">Tag</th>' in table
    rows = shop.site.json(
        "/tasks/datatable?draw=1&start=0&length=9&order[0][column]=0&order[0][dir]=desc"
        "&columns[0][data]=identify_tag"
    )["data"]
    assert "tagged" in [row["identify_tag"] for row in rows]


def test_lengths_of_the_pending_queue_and_of_the_ledger_are_among_the_queues(shop: Shop) -> None:
    shop.hold("long", 4)
    wait_until(lambda: shop.affinity.stats("jobs").entries == 4, what="the ledger")
    queues = {q["name"]: q["messages"] for q in shop.site.json("/api/queues/length")["active_queues"]}
    assert queues["jobs (ledger)"] == 4
    assert queues["jobs"] == 0
    shop.producer.app.send_task("jobs.gated", ("kept", 0), queue="jobs", countdown=3600)
    assert shop.site.ask("/broker", Authorization=USER)[1].count("jobs (ledger)") == 1
    shop.open("long")
    wait_until(lambda: shop.affinity.stats("jobs").scheduled == 1, what="the scheduled task")
    assert shop.affinity.purge("jobs", "kept") == 1
    shop.quiet()


def test_the_page_shows_slots_backlogs_leader_and_changes_and_steers_a_tag(shop: Shop) -> None:
    strange = "<b>x</b>\r&amp; 'y' \"z\""
    shop.hold("busy", 3)
    shop.producer.send("queued", 2, task="gated")
    page = wait_until(lambda: text if "busy" in (text := shop.site.page()) else "", what="the page")
    leader = shop.affinity.leader("jobs")
    assert leader is not None and f"term {leader.term}" in page
    assert 'id="affinity-busy">2 <span' in page or 'id="affinity-busy">1 <span' in page
    token = shop.site.token()
    assert shop.site.operate("pause", token, queue="jobs", tag=strange) == (
        200, json.dumps({"message": f"Tag {strange!r} of 'jobs' is paused. What runs ends."}).replace("</", "<\\/"),
    )  # fmt: skip
    assert shop.affinity.explain(strange).obstacles
    assert shop.affinity.changes(1)[0].who == "jane (Flower)"
    page = shop.site.page()
    assert "<b>x</b>" not in page and "PAUSED" in page
    order = re.search(r'data-action="resume"\s+data-order="([^"]*)"', page)
    assert order is not None
    assert shop.site.operate("resume", token, queue="jobs", tag=strange)[0] == 200
    assert not shop.affinity.explain(strange).obstacles
    assert shop.site.operate("pause", token, queue="jobs")[0] == 200
    assert shop.affinity.stats("jobs").paused
    assert shop.site.operate("resume", token, queue="jobs")[0] == 200
    assert not shop.affinity.stats("jobs").paused
    shop.open("busy", "queued")
    shop.quiet()


def test_who_is_not_let_in_or_has_no_token_changes_nothing(shop: Shop) -> None:
    site, token = shop.site, shop.site.token()
    before = shop.affinity.changes(200)
    assert site.ask("/affinity")[0] == 401
    assert site.ask("/affinity/tables", Authorization="Basic " + b64encode(b"jane:no").decode())[0] == 401
    assert site.operate("pause", token, user="", queue="jobs")[0] == 401
    assert site.operate("pause", queue="jobs")[0] == 403
    status, text = site.operate("pause", token, queue="jobs", tag="")
    assert (status, "identify_tag is empty" in text) == (400, True)
    status, text = site.operate("pause", token, queue="nosuch")
    assert (status, "'jobs'" in text) == (400, True)
    cross = {"Cookie": f"_xsrf={token}", "X_XSRFToken": token, "Authorization": USER}
    assert site.ask("/affinity/pause", b'{"queue": "jobs"}', Sec_Fetch_Site="cross-site", **cross)[0] == 403
    assert site.ask("/affinity/pause", b"queue=jobs", **cross)[0] == 400
    assert site.ask("/affinity/purge", b'{"queue": "jobs"}', **cross)[0] == 404
    assert shop.affinity.changes(200) == before
    assert not shop.affinity.stats("jobs").paused


def test_a_flower_without_authentication_or_read_only_shows_the_page_and_steers_nothing(
    shop: Shop,
) -> None:
    sites = [
        shop.flower("--url_prefix=ops"),
        shop.flower("--basic_auth=jane:secret", "--read_only=True"),
    ]
    for site, prefix, refusal in zip(sites, ("/ops", ""), (401, 403), strict=True):
        site.node.wait_ready()
        site.url += prefix
        status, page, _ = site.ask("/affinity", Authorization=USER)
        assert status == 200
        assert f'data-source="{prefix}/affinity/tables"' in page
        assert f'href="{prefix}/affinity"' in page
        assert "data-order" not in page.partition("<script>")[0] and 'id="affinity-form"' not in page
        assert site.operate("pause", site.token(), queue="jobs")[0] == refusal
        site.node.term()
    assert not shop.affinity.stats("jobs").paused


def test_behind_oauth_only_who_has_logged_in_sees_the_page_and_steers(shop: Shop) -> None:
    site = shop.flower(
        "--auth=ann@example.com", "--auth_provider=flower.views.auth.GithubLoginHandler",
        "--oauth2_key=key", "--oauth2_secret=secret", "--oauth2_redirect_uri=http://localhost/login",
        "--cookie_secret=of-this-test",
    )  # fmt: skip
    site.node.wait_ready()
    for path in ("/affinity", "/affinity/tables"):
        status, _, headers = site.ask(path, Authorization=USER)
        assert (status, headers["Location"].startswith("/login?")) == (302, True)
    for user, known in (("eve@example.com", False), ("ann@example.com", True)):
        cookie = f"user={create_signed_value('of-this-test', 'user', user).decode()}"
        assert (site.ask("/affinity/tables", Cookie=cookie)[0] == 200) is known
        token = site.token(Cookie=cookie) if known else "2|00|00|1"
        both = {"Cookie": f"{cookie}; _xsrf={token}", "X_XSRFToken": token}
        status, _, _ = site.ask("/affinity/pause", b'{"queue": "jobs", "tag": "oauth"}', **both)
        assert status == (200 if known else 403)
        assert bool(shop.affinity.explain("oauth").obstacles) is known
    assert shop.affinity.changes(1)[0].who == "ann@example.com (Flower)"
    shop.affinity.resume("jobs", "oauth")
    site.node.term()


def test_a_flower_whose_redis_is_away_says_so_and_goes_on_when_it_is_back(
    server: Server, cluster: Cluster
) -> None:
    site = start_flower(cluster, "--basic_auth=jane:secret")
    site.node.wait_ready()
    assert "nobody schedules it" in site.page()
    token = site.token()
    server.kill()
    status, text, _ = site.ask("/affinity", Authorization=USER)
    assert status == 503
    assert "ConnectionError" in text and 'status-dot-error"' in text
    status, text = site.operate("pause", token, queue="jobs")
    assert (status, text.startswith("Redis does not answer: ")) == (503, True)
    server.restart()
    assert wait_until(lambda: site.ask("/affinity", Authorization=USER)[0] == 200, what="the page")


def test_a_killed_and_rescued_worker_leaves_no_ghost_in_flower(shop: Shop) -> None:
    node = shop.worker("doomed")
    wait_for_nodes(shop.affinity, 3)

    def shown() -> set[str]:
        rows = {row["hostname"] for row in shop.site.json("/workers?json=1")["data"]}
        return rows | set(shop.site.json("/api/workers?refresh=1"))

    wait_until(lambda: "doomed@test" in shop.site.json("/api/workers?refresh=1"), what="the worker")
    assert shown() == {"w1@test", "w2@test", "doomed@test"}
    node.destroy()
    wait_for_nodes(shop.affinity, 2)
    wait_until(lambda: shown() == {"w1@test", "w2@test"}, 30, "Flower without the dead worker")
    assert "doomed" not in shop.site.page()
    node.start()  # the same name again
    wait_for_nodes(shop.affinity, 3)
    wait_until(lambda: "doomed@test" in shown(), what="its successor")
    node.term()
    node.wait()
    wait_for_nodes(shop.affinity, 2)
