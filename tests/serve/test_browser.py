"""The pages in a real browser: Chromium, driven by playwright."""

import json
import os
import shutil
import socket
import subprocess
import time

import pytest

from hpc_absa.report.history import load
from hpc_absa.report.page import page as report_page
from hpc_absa.rundir import RunDir
from tests.report.synthetic import JOB, Log, whole_run
from tests.serve.test_server import serving

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install 'hpc-absa[browser]'"
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH: apt-get install chromium"),
]
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]


@pytest.fixture(name="browser", scope="module")
def _browser():
    with playwright.sync_playwright() as api:
        browser = api.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(name="tab")
def _tab(browser):
    """A page; every error in it and every request that it makes is recorded."""
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    page = context.new_page()
    page.errors, page.requests = [], []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("request", lambda request: page.requests.append(request.url))
    page.on("dialog", lambda dialog: page.errors.append(dialog.message))
    yield page
    assert page.errors == []
    context.close()


def drawn(tab):
    tab.wait_for_selector("#panels[data-drawn] canvas", timeout=20_000)
    tab.wait_for_timeout(150)


def open_report(tab, paths, out):
    out.write_text(report_page([load(path) for path in paths]))
    tab.goto(f"file://{out}")
    drawn(tab)


def hover(tab, panel, share):
    """Move the pointer to a part of the width of a panel's plot; returns the values shown."""
    plot = tab.locator(f"[data-panel={panel}] .plot")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    tab.mouse.move(box["x"] + 70, box["y"] + 90)
    tab.mouse.move(box["x"] + 58 + (box["width"] - 70) * share, box["y"] + 90)
    tab.wait_for_selector("#readout:not([hidden])", timeout=5000)
    return tab.locator("#readout").inner_text()


def shown(tab, panel):
    """The text alternative of a panel, which names what is drawn."""
    return tab.locator(f"[data-panel={panel}] .plot").get_attribute("aria-label")


@pytest.fixture(name="two", scope="module")
def _two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    whole_run(folder / "one")
    other = Log(folder / "two", JOB.replace('"absa"', '"bl"').replace('"digits"', '"other"'))
    other.start().train_epoch(0.5).train_epoch(0.6)
    return folder


def test_hover_shows_the_value_and_nothing_is_requested(tab, two, tmp_path):
    open_report(tab, [two / "one"], tmp_path / "report.html")
    text = hover(tab, "accuracy", 0.99)
    assert "epochs 8" in text
    assert "97.4" in text
    assert "rank" not in shown(tab, "accuracy")
    tab.select_option("#axis", "step")
    drawn(tab)
    assert "SGD iterations" in hover(tab, "accuracy", 0.5)
    assert tab.requests == [f"file://{tmp_path}/report.html"]


def test_toggling_hides_a_run_and_the_table_is_sorted(tab, two, tmp_path):
    open_report(tab, [two / "one", two / "two"], tmp_path / "report.html")
    assert "other" in shown(tab, "loss")
    tab.click("#legend button:has-text('other')")
    assert "other" not in shown(tab, "loss")
    assert "digits" in shown(tab, "loss")
    tab.click("#legend button:has-text('other')")
    assert "other" in shown(tab, "loss")
    first = tab.locator("table.sortable tbody tr td:first-child")
    assert first.all_inner_texts() == ["digits", "other"]
    tab.click("table.sortable th:has-text('test accuracy') button")
    assert first.all_inner_texts() == ["other", "digits"]


def test_zoom_and_reset(tab, two, tmp_path):
    open_report(tab, [two / "one"], tmp_path / "report.html")
    plot = tab.locator("[data-panel=loss] .plot")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    whole = hover(tab, "accuracy", 0.5)
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    tab.mouse.move(box["x"] + 80, box["y"] + 30)
    tab.mouse.down()
    tab.mouse.move(box["x"] + 200, box["y"] + 120, steps=4)
    tab.mouse.up()
    tab.wait_for_timeout(200)
    assert hover(tab, "accuracy", 0.5) != whole  # all panels show the same part
    tab.click("#reset")
    tab.wait_for_timeout(200)
    assert hover(tab, "accuracy", 0.5) == whole


def test_hostile_names_stay_text(tab, tmp_path):
    name = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"
    for run in ("a", "b"):
        job = JOB.replace('"digits"', json.dumps(name + run))
        Log(tmp_path / run, job).start(hosts=[name]).train_epoch().train_epoch(metrics={name: 1.0})
    open_report(tab, [tmp_path / "a", tmp_path / "b"], tmp_path / "report.html")
    hover(tab, "loss", 0.9)
    assert tab.locator("img").count() == 0
    assert name in tab.locator("#legend").inner_text()
    assert len(tab.requests) == 1


def test_no_column_is_cut_off(tab, two, tmp_path):
    open_report(tab, [two / "one"], tmp_path / "report.html")
    for width in (1400, 1000):
        tab.set_viewport_size({"width": width, "height": 900})
        wide = "els => els.filter(e => e.scrollWidth > e.clientWidth + 1).length"
        assert tab.eval_on_selector_all(".scroll", wide) == 0
    tab.set_viewport_size({"width": 500, "height": 900})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 500


def test_a_running_job_moves_by_itself_and_a_killed_one_is_shown_as_such(tab, tmp_path):
    process = subprocess.Popen(["sleep", "60"])
    log = Log(tmp_path / "run").start().train_epoch(0.5).train_epoch(0.6)
    holder = {"host": socket.gethostname(), "pid": process.pid, "started": time.time()}
    RunDir(log.path).lock.write_text(json.dumps(holder))
    try:
        with serving([log.path]) as address:
            tab.goto(address)
            drawn(tab)
            assert tab.locator(".state").inner_text() == "running"
            assert "60 at last" in shown(tab, "accuracy")
            log.train_epoch(0.875)
            moved = "[data-panel=accuracy] .plot[aria-label*='87.5']"
            tab.wait_for_selector(moved, timeout=10_000)
            assert "87.50 %" in tab.locator(".tiles").inner_text()
            process.kill()
            process.wait()
            tab.wait_for_selector(".state.interrupted", timeout=10_000)
            assert all(url.startswith(address) for url in tab.requests)
    finally:
        process.kill()


@pytest.mark.slow
def test_fifty_runs_with_a_hundred_thousand_events_are_drawn_in_two_seconds(tab, tmp_path):
    for n in range(50):
        _long_run(tmp_path / f"run{n}", n)
    out = tmp_path / "report.html"
    out.write_text(report_page([load(tmp_path / f"run{n}") for n in range(50)]))
    begin = time.perf_counter()
    tab.goto(f"file://{out}")
    drawn(tab)
    assert time.perf_counter() - begin < 2.0 * float(os.environ.get("HPC_ABSA_SLOWNESS", "1"))


def _long_run(path, n):
    log = Log(path, JOB.replace("seed = 0", f"seed = {n % 5}").replace("2.0", str(2 + n // 5)))
    log.start()
    lines = []
    for step in range(1, 2000):
        event = {"event": "progress", "time": log.now + step, "phase": 0, "epoch": step / 200}
        event |= {"step": step * 10, "train_loss": 2 / step, "samples_per_second": 1e3 + n}
        event |= {"grad_norm": 1 + step % 7, "memory": 1e9, "lr": 0.1, "ranks": 1}
        lines.append(json.dumps(event | {"global_batch": 32}))
    with (path / "events.jsonl").open("a") as file:
        file.write("\n".join(lines) + "\n")
