"""Laws of the Affinity page in a real browser: Debian's Chromium, headless.

With AFFINITY_SCREENSHOTS=docs/images the pictures of docs/howto_flower.md and docs/operations.md are taken anew.
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from acceptance.flower_shop import APP, Shop, running_shop
from acceptance.support import QUICK
from harness import wait_until

pytestmark = [pytest.mark.acceptance, pytest.mark.browser]

#: Without those of the network, Chromium asks its maker's hosts at each start.
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--force-color-profile=srgb", "--window-size=1440,1200",
)  # fmt: skip
#: Of the terminal.
COLUMNS = 110
ERASE_LINE = "\x1b[2K"
#: WebDriver scrolls by itself only to what is outside the window, not to what Flower's bar covers.
INTO_VIEW = "arguments[0].scrollIntoView({block: 'nearest', behavior: 'instant'})"
#: For each button of the page: does it lie open where the focus took it to, or what is on top of it.
COVERED = """
document.documentElement.style.scrollBehavior = 'auto';
return [...document.querySelectorAll('#affinity-view button, #affinity-form button')].reverse().map(b => {
  b.focus({focusVisible: true});
  const box = b.getBoundingClientRect();
  const top = document.elementFromPoint(box.x + box.width / 2, box.y + 1);
  return b.contains(top) ? '' : b.dataset.order + ' at ' + box.y + ' beneath ' + (top && top.className);
}).filter(Boolean);
"""
STRANGE = "<b id=injected>x</b>\r&amp; 'y' \"z\""


@pytest.fixture(scope="module")
def shop(server_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    with running_shop(tmp_path_factory.mktemp("page"), concurrency=4) as shop:
        yield shop


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium: without it, laws are skipped at home and fail in CI."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        reason = "found no chromium and chromedriver: apt-get install chromium chromium-driver"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    options = ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = Chrome(options=options, service=ChromeService(driver))
    try:
        yield chrome
    finally:
        chrome.quit()


class Tab:
    """What is on the page, and what can be clicked."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser

    def text(self, selector: str) -> str:
        """The text of a part, "" if it is not there; in one step, as parts are replaced."""
        script = "var e = document.querySelector(arguments[0]); return e ? e.innerText : ''"
        return str(self.browser.execute_script(script, selector))

    def wait_text(self, selector: str, text: str) -> None:
        wait_until(lambda: text in self.text(selector), what=f"{text!r} in {selector}")

    def click(self, selector: str, row: str = "") -> None:
        """Click the button in the row with that text, as soon as there is one."""
        from selenium.common.exceptions import (
            ElementClickInterceptedException,
            StaleElementReferenceException,
        )

        def done() -> bool:
            try:
                for found in self.browser.find_elements("css selector", selector):
                    parent = found.find_element("xpath", "./ancestor::tr") if row else found
                    if row in parent.text:
                        self.browser.execute_script(INTO_VIEW, found)
                        found.click()
                        return True
            except (StaleElementReferenceException, ElementClickInterceptedException):
                pass  # the tables were fetched anew, and what is below them has moved
            return False

        wait_until(done, what=f"{selector} of {row!r}")

    def point(self, selector: str) -> None:
        """Move the pointer there, to click or not."""
        from selenium.webdriver import ActionChains

        found = self.browser.find_element("css selector", selector)
        ActionChains(self.browser).move_to_element(found).perform()

    def picture(self, name: str, width: int = 1440) -> None:
        """A picture of the whole page, where AFFINITY_SCREENSHOTS says."""
        where = os.environ.get("AFFINITY_SCREENSHOTS")
        if where:
            self.browser.set_window_size(width, 400)
            high = self.browser.execute_script("return document.documentElement.scrollHeight")
            self.browser.set_window_size(width, high + 140)
            assert self.browser.get_screenshot_as_file(str(Path(where) / name))


def terminal(shop: Shop, *arguments: str) -> str:
    """What a command of Celery writes on a terminal of COLUMNS and 60 lines."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 60, COLUMNS, 0, 0))
    environ = {**shop.cluster.environ, **QUICK, "TERM": "xterm-256color"}
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        environ.pop(name, None)
    with subprocess.Popen(
        [sys.executable, "-m", "celery", *arguments], stdout=theirs, env=environ, cwd=shop.cluster.directory
    ) as running:
        os.close(theirs)
        written = b""
        try:
            while chunk := os.read(ours, 65536):
                written += chunk
        except OSError:
            pass  # Linux says EIO when the last writer is gone
    os.close(ours)
    assert running.returncode == 0, written
    return written.decode().replace("\r\n", "\n")


def fill(shop: Shop) -> None:
    """Eight slots and a few tenants, one of them hot, one paused, and a dead letter."""
    app = shop.producer.app
    app.send_task("jobs.retired", (1,), queue="jobs")  # no tag, and no task that could tell it
    for tag, count in (("acme", 64), ("globex", 9), ("initech", 5), ("umbrella", 3)):
        shop.hold(tag, count)
    for tag in ("hooli", "stark", "wayne", "wonka"):
        shop.hold(tag)
    for tag, count in (("cyberdyne", 17), ("tyrell", 12), ("soylent", 4)):
        shop.producer.send(tag, count, task="gated")
    shop.affinity.pause("jobs", "tyrell", by="oncall@console")
    wait_until(lambda: shop.affinity.stats("jobs").dead == 1, what="the dead letter")
    wait_until(lambda: shop.affinity.explain("soylent").place, what="its turn")


def test_an_operator_sees_slots_and_backlogs_live_and_pauses_and_resumes_by_clicks(
    browser: Any, shop: Shop
) -> None:
    fill(shop)
    tab, address = Tab(browser), shop.site.url.partition("//")[2]
    browser.get(f"http://jane:secret@{address}/workers")
    tab.click("a.nav-link[href='/affinity']")
    tab.wait_text(".app-nav .nav-link.active", "Affinity")
    leader = shop.affinity.leader("jobs")
    assert leader is not None
    tab.wait_text("#affinity-queues", f"term {leader.term}")
    tab.wait_text("#affinity-busy", "8 of 8")
    tab.wait_text("#affinity-letters", "jobs.retired")
    slots = tab.text("#affinity-slots").split()
    assert {"acme", "globex", "initech", "umbrella", "hooli", "stark", "wayne", "wonka"} <= set(slots)
    assert tab.text("#affinity-backlogs tbody tr").startswith("acme")
    tab.wait_text("#affinity-refreshed", "Updated")
    tab.picture("flower_affinity.png")

    # What comes is shown without a reload, and foreign text is text
    shop.producer.send(STRANGE, 2, task="gated")
    tab.wait_text("#affinity-backlogs", "<b id=injected>x</b>")
    assert not browser.find_elements("css selector", "#injected")

    # Nothing moves under the pointer
    tab.point("#affinity-backlogs button")
    tab.wait_text("#affinity-refreshed", "Held while a button is pointed at")
    tab.point("#affinity-refreshed")
    tab.wait_text("#affinity-refreshed", "Updated")

    # One tag, whatever is in its name
    tab.click("#affinity-backlogs button[data-action=pause]", "<b id=injected>")
    tab.wait_text("#toast-container", "is paused. What runs ends.")
    wait_until(lambda: shop.affinity.explain(STRANGE).place is None, what="the pause")
    assert shop.affinity.changes(1)[0].who == "jane (Flower)"
    assert shop.affinity.changes(1)[0].target == STRANGE
    tab.click("#affinity-backlogs button[data-action=resume]", "<b id=injected>")
    wait_until(lambda: shop.affinity.explain(STRANGE).place, what="the resume")

    # A tag by its name
    browser.find_element("id", "affinity-form-tag").send_keys("hooli")
    tab.click("#affinity-form button[value=pause]")
    wait_until(lambda: shop.affinity.explain("hooli").obstacles, what="the pause of hooli")
    tab.click("#affinity-form button[value=resume]")
    wait_until(lambda: not shop.affinity.explain("hooli").obstacles, what="the resume of hooli")

    # The queue: asked before
    tab.click("#affinity-queues button[data-action=pause]")
    browser.switch_to.alert.dismiss()
    assert not shop.affinity.stats("jobs").paused
    tab.click("#affinity-queues button[data-action=pause]")
    browser.switch_to.alert.accept()
    tab.wait_text("#affinity-queues", "PAUSED")
    assert shop.affinity.stats("jobs").paused
    tab.click("#affinity-queues button[data-action=resume]")
    wait_until(lambda: not shop.affinity.stats("jobs").paused, what="the queue's resume")

    # To the end
    tab.point("#affinity-refreshed")
    shop.affinity.purge("jobs", STRANGE)
    shop.affinity.resume("jobs", "tyrell")
    shop.open("acme", "globex", "initech", "umbrella", "hooli", "stark")
    tab.wait_text("#affinity-slots", "tyrell")
    shop.open("wayne", "wonka", "cyberdyne", "tyrell", "soylent")
    tab.wait_text("#affinity-backlogs", "No tag has tasks waiting.")
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_top_on_a_terminal_shows_queues_slots_and_backlogs(
    browser: Any, shop: Shop, tmp_path: Path
) -> None:
    from rich.console import Console
    from rich.text import Text

    for tag, count in (("acme", 41), ("globex", 9), ("initech", 5), ("umbrella", 3)):
        shop.producer.send(f"{tag}-eu", count, task="gated")
    wait_until(lambda: shop.affinity.explain("umbrella-eu").holds, what="the last to run")
    written = terminal(shop, "-A", APP, "affinity", "top", "-n", "1", "--tags", "4")
    *_, frame = written.split(ERASE_LINE)  # rich goes up and draws over the one before
    shown = Text.from_ansi(frame.strip("\n"))
    lines = shown.plain.splitlines()
    assert any("jobs" in line and "on" in line for line in lines), shown.plain
    assert any("w1@test" in line and "-eu" in line for line in lines), shown.plain
    assert any("acme-eu" in line and "w" in line for line in lines), shown.plain
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(shown)
    (tmp_path / "top.html").write_text(console.export_html(inline_styles=True), encoding="utf-8")
    browser.get((tmp_path / "top.html").as_uri())
    Tab(browser).picture("top.png", 1200)
    shop.open("acme-eu", "globex-eu", "initech-eu", "umbrella-eu")
    shop.quiet()


def test_a_button_that_gets_the_focus_is_not_beneath_the_bar(browser: Any, shop: Shop) -> None:
    tab, address = Tab(browser), shop.site.url.partition("//")[2]
    shop.producer.send("hidden", 2, task="gated")
    browser.set_window_size(1440, 500)
    browser.get(f"http://jane:secret@{address}/affinity")
    tab.wait_text("#affinity-queues", "jobs")
    assert browser.execute_script("return document.documentElement.scrollHeight > 2 * innerHeight")
    assert browser.execute_script(COVERED) == []
    browser.set_window_size(1440, 1200)


def test_the_table_of_tasks_has_a_column_of_tags(browser: Any, shop: Shop) -> None:
    tab, address = Tab(browser), shop.site.url.partition("//")[2]
    shop.open("acme", "globex", "initech")

    def told() -> bool:
        """Whether workers tell Flower of tasks by now; it asks them to, every 5 s."""
        shop.producer.send("acme", task="gated")
        return any(task["identify_tag"] == "acme" for task in shop.site.json("/api/tasks").values())

    wait_until(told, what="the events of tasks")
    for tag in ("acme", "globex", "initech", "globex"):
        shop.producer.send(tag, 3, task="gated")
    browser.get(f"http://jane:secret@{address}/tasks")
    tab.wait_text("#tasks-table_wrapper thead", "TAG")
    tab.wait_text("#tasks-table tbody", "globex")
    tab.picture("flower_tasks.png")
    browser.find_element("css selector", "#tasks-table_wrapper th:nth-child(2)").click()  # sorts
    tab.wait_text("#tasks-table tbody tr", "acme")
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
