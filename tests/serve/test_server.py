"""The server: what it shows, what it refuses, and that nothing but the runs can be read."""

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Thread

import psutil
import pytest
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets

from hpc_absa.errors import UsageError
from hpc_absa.rundir import RunDir
from hpc_absa.serve.server import application, serve
from hpc_absa.serve.site import SHORTEST, Site
from tests.report.synthetic import JOB, Log, whole_run


@contextmanager
def serving(paths, token="", local=True):
    """The address of a server in a thread."""
    started = Future()

    async def work():
        server = HTTPServer(application(Site(paths), token, local))
        sockets = bind_sockets(0, "127.0.0.1")
        server.add_sockets(sockets)
        ended = asyncio.Event()
        port = sockets[0].getsockname()[1]
        started.set_result((port, asyncio.get_running_loop(), ended))
        await ended.wait()
        server.stop()
        await server.close_all_connections()

    thread = Thread(target=lambda: asyncio.run(work()), daemon=True)
    thread.start()
    port, loop, ended = started.result(10)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(10)


def get(address, method="GET", **headers):
    """Status, text and headers of the answer."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(address, headers=named, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), error.headers


@pytest.fixture(name="runs")
def _runs(tmp_path):
    whole_run(tmp_path / "runs" / "one")
    log = Log(tmp_path / "runs" / "two", JOB.replace('"digits"', '"<b>two</b>"')).start()
    log.train_epoch(0.5).train_epoch(0.6)
    (log.path / "logs").mkdir()
    (log.path / "logs" / "phase-1-rank-0.log").write_text("<script>alert(1)</script>\n")
    (tmp_path / "secret.log").write_text("secret")
    (log.path / "logs" / "link.log").symlink_to(tmp_path / "secret.log")
    return tmp_path / "runs"


def test_list_and_pages_of_the_runs_in_a_folder(runs, monkeypatch):
    monkeypatch.setattr("hpc_absa.serve.site.SEARCH_SECONDS", 0.0)
    with serving([runs]) as address:
        status, text, headers = get(f"{address}/")
        assert status == 200
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert 'href="/run/one"' in text
        assert "&lt;b&gt;two" in text
        assert "<b>two" not in text
        assert "<polyline" in text
        assert "97.40 %" in get(f"{address}/run/one")[1]
        assert "2 runs" in get(f"{address}/compare")[1]
        assert b"Bokeh" in get(f"{address}/static/bokeh.min.js")[1].encode()
        # a run that appears later
        Log(runs / "three").start()
        assert 'href="/run/three"' in get(f"{address}/")[1]


def test_runs_of_the_same_name_are_all_shown(tmp_path):
    for path in ("x/a~b", "y/a~b", "y/c", "z/c"):
        Log(tmp_path / path).start()
    assert list(Site([tmp_path]).runs()) == ["a~b", "a~b~2", "c", "c~2"]


def test_one_run_is_shown_at_once(runs):
    with serving([runs / "one"]) as address:
        assert "97.40 %" in get(f"{address}/")[1]


def test_a_live_page_is_sent_again_only_after_a_change(runs):
    with serving([runs]) as address:
        version = re.search(r'data-version="(\w+)"', get(f"{address}/run/two")[1])[1]
        assert get(f"{address}/run/two", X_Live=version)[0] == 304
        compared = re.search(r'data-version="(\w+)"', get(f"{address}/compare")[1])[1]
        assert get(f"{address}/compare", X_Live=compared)[0] == 304
        with (runs / "two" / "events.jsonl").open("a") as file:
            event = {"event": "progress", "time": time.time(), "phase": 0, "epoch": 2.5}
            file.write(json.dumps({**event, "step": 120, "train_loss": 0.1}) + "\n")
        status, text, _ = get(f"{address}/run/two", X_Live=version)
        assert status == 200
        assert version not in text


def test_a_run_whose_process_was_killed_is_shown_as_interrupted(runs):
    process = subprocess.Popen(["sleep", "60"])
    holder = {"host": socket.gethostname(), "pid": process.pid, "started": time.time()}
    RunDir(runs / "two").lock.write_text(json.dumps(holder))
    with serving([runs / "two"]) as address:
        text = get(f"{address}/")[1]
        assert 'class="state running">running' in text
        version = re.search(r'data-version="(\w+)"', text)[1]
        process.kill()
        process.wait()
        status, text, _ = get(f"{address}/", X_Live=version)
        assert status == 200
        assert 'class="state interrupted">interrupted' in text


def test_logs_are_shown_as_text_and_links_to_elsewhere_are_not(runs):
    with serving([runs]) as address:
        text = get(f"{address}/run/two/log/phase-1-rank-0.log")[1]
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
        assert get(f"{address}/run/two/log/link.log")[0] == 404
        assert "link.log" not in get(f"{address}/run/two")[1]


@pytest.mark.parametrize(
    "path",
    [
        "/run/..%2f..%2fsecret.log",
        "/run/two/log/..%2f..%2f..%2fsecret.log",
        "/run/two/log/%2e%2e%2fjob.toml",
        "/static/..%2fpage.css",
        "/static/page.css",
        "/run/two/events.jsonl",
        "/etc/passwd",
    ],
)
def test_nothing_else_can_be_read(runs, path):
    with serving([runs]) as address:
        status, text, _ = get(address + path)
        assert status == 404
        assert "secret" not in text


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_nothing_can_be_written(runs, method):
    with serving([runs]) as address:
        assert get(f"{address}/run/one", method=method)[0] == 405


def test_a_page_of_another_site_cannot_read_through_a_name_that_leads_here(runs):
    with serving([runs]) as address:
        assert get(address, Host="evil.example:80")[0] == 403
        assert get(address, Host="127.0.0.1.evil.example")[0] == 403
        assert get(address, Host="localhost:9999")[0] == 200
        assert get(address, Host="[::1]:80")[0] == 200


def test_the_name_of_any_loopback_address_is_accepted(runs):
    """As printed after `--host 127.0.0.2`."""
    with serving([runs]) as address:
        assert get(address, Host="127.0.0.2:8265")[0] == 200


def test_elsewhere_than_on_loopback_a_token_is_needed(runs):
    with serving([runs], token="abc", local=False) as address:
        assert get(address)[0] == 403
        assert get(f"{address}/run/one?token=abd")[0] == 403
        assert get(f"{address}/run/one?token=%C3%A9")[0] == 403
        assert get(f"{address}/static/page.js")[0] == 403
        assert get(address, Cookie="hpc-absa-token=abc")[0] == 200
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        with opener.open(f"{address}/?token=abc", timeout=10) as answer:
            assert answer.url == f"{address}/"  # the token is not left in the address
            assert "HttpOnly" not in answer.read().decode()


def test_a_page_that_takes_long_is_made_less_often(runs):
    site = Site([runs / "one"])
    site.run_page("one", site.run("one"))
    assert site.seconds == SHORTEST
    site.took(0.3)
    site.took(0.4)
    assert site.seconds == pytest.approx(0.3 / 0.007, abs=0.1)


def test_wrong_use(tmp_path, runs):
    with pytest.raises(UsageError, match="not a run directory"):
        Site([tmp_path / "runs" / "two" / "logs"])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UsageError, match="--port 0"):
            serve([runs], "127.0.0.1", taken.getsockname()[1], False, print)


@pytest.mark.slow
def test_following_a_run_takes_less_than_one_percent_of_a_core(tmp_path):
    """A run with 2,000 events that writes one each second, and a page that follows it."""
    log = Log(tmp_path / "run").start()
    write_progress(log, 2000)
    command = [sys.executable, "-m", "hpc_absa", "serve", str(log.path), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            address = re.search(r"http://\S+", process.stdout.readline())[0]
            status, text, _ = get(address)
            server, begin = psutil.Process(process.pid), time.monotonic()
            before = sum(server.cpu_times()[:2])
            due = begin
            while time.monotonic() - begin < 60:
                write_progress(log, 1)
                if time.monotonic() >= due:
                    version = re.search(r'data-version="(\w+)"', text)[1]
                    status, fresh, _ = get(address, X_Live=version)
                    text = fresh if status == 200 else text
                    due = time.monotonic() + float(re.search(r'data-live="([\d.]+)"', text)[1])
                time.sleep(1)
            share = (sum(server.cpu_times()[:2]) - before) / (time.monotonic() - begin)
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
    print(f"{share:.2%} of a core")
    assert share < 0.01


def write_progress(log, count):
    lines = []
    for _ in range(count):
        log.step += 1
        event = {
            "event": "progress",
            "time": log.now + log.step,
            "phase": 0,
            "epoch": log.step / 50,
        }
        event |= {"step": log.step, "samples": 32 * log.step, "train_loss": 1 / log.step}
        lines.append(json.dumps(event | {"samples_per_second": 1e3, "grad_norm": 1.0}))
    with (log.path / "events.jsonl").open("a") as file:
        file.write("\n".join(lines) + "\n")
