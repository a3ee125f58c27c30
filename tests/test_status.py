"""Where a run stands, in each of its states, from its files alone."""

import io
import json
import math
import os
import socket
import subprocess
import sys
import time

import pytest
from rich.console import Console

from hpc_absa.cli import inspecting
from hpc_absa.cli.following import progress_bar, watch
from hpc_absa.errors import UsageError
from hpc_absa.report.history import load
from hpc_absa.rundir import RunDir
from hpc_absa.status import render, status
from hpc_absa.supervisor.chain import Chain, Link
from tests.report.synthetic import JOB, Log, whole_run
from tests.supervisor.fake_slurm import FakeSlurm


def write_lock(log, pid, host=None, started=None):
    record = {
        "host": host or socket.gethostname(),
        "pid": pid,
        "started": time.time() if started is None else started,
    }
    (log.path / "lock").write_text(json.dumps(record))


def dead_pid():
    """The id of a process that has just exited."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def printed(now):
    console = Console(width=100, file=open(os.devnull, "w"), record=True)  # noqa: SIM115
    render(now, console)
    return console.export_text()


def test_not_started(tmp_path):
    now = status(Log(tmp_path).path)
    assert now.state == "not started"
    assert now.epochs == 8
    assert now.phase is None
    assert now.next_command == f"hpc-absa run {tmp_path}/job.toml --run-dir {tmp_path}"
    assert "not started" in printed(now)


def test_a_script_that_was_started_by_hand_is_continued_by_hand(tmp_path, monkeypatch):
    begun = {"command": "python train.py --lr 1", "directory": str(tmp_path)}
    log = Log(tmp_path).start(**begun)
    assert status(tmp_path).next_command == f"cd {tmp_path} && python train.py --lr 1"
    monkeypatch.chdir(tmp_path)
    assert status(tmp_path).next_command == "python train.py --lr 1"
    log.start(**begun, ranks=2)
    assert status(tmp_path).next_command == "mpirun -np 2 python train.py --lr 1"
    RunDir(tmp_path).write_launch("")
    assert status(tmp_path).next_command == f"hpc-absa launch --run-dir {tmp_path}"


def test_running(tmp_path):
    log = Log(tmp_path).start().train_epoch(0.8, seconds=4.0).decide(9.5)
    write_lock(log, os.getpid())
    now = status(tmp_path, now=log.now + 30)
    assert now.state == "running"
    assert now.next_command is None
    assert (now.phase, now.epoch, now.step, now.samples) == (0, 1.0, 50, 1600)
    assert (now.ranks, now.global_batch, now.lr) == (1, 32, 0.05)
    assert (now.eigenvalue, now.reference) == (9.5, 9.5)
    assert now.last_decision == "λ 9.5 against 9.5: batch 32 → 32"
    assert now.test_accuracy == 0.8
    assert now.seconds_used == pytest.approx(4.5 + 30)
    assert now.seconds_left == pytest.approx(7 * 4.5)
    assert now.last_event_age == pytest.approx(30)


def test_running_and_asked_to_stop(tmp_path):
    log = Log(tmp_path).start()
    write_lock(log, os.getpid())
    (tmp_path / "stop").touch()
    assert "asked to stop" in status(tmp_path).explanation


def test_failure_is_not_the_end_while_the_supervisor_runs(tmp_path):
    log = Log(tmp_path).start().event("failure", reason="killed", rank=1)
    write_lock(log, os.getpid())
    assert status(tmp_path).state == "running"


def test_done(tmp_path):
    log = whole_run(tmp_path)
    now = status(tmp_path, now=log.now + 9999)
    assert now.state == "done"
    assert (now.epoch, now.step, now.ranks, now.global_batch) == (8.0, 186, 4, 256)
    assert now.test_accuracy == 0.974
    assert now.failures == 1
    assert now.last_failure == "killed by signal 9 (rank 1, on node1, exit code 137)"
    assert now.eigenvalue == 3.9
    assert now.seconds_used == pytest.approx(51.1)
    assert now.seconds_left == 0
    assert now.next_command == f"hpc-absa report {tmp_path}"


def test_last_phase_that_ends_a_microbatch_short_is_complete(tmp_path):
    log = Log(tmp_path).start().train_epoch()
    log.samples -= 32
    log.end("done").event("done", steps=50, epochs=1, test_accuracy=0.9)
    assert status(tmp_path).epoch == 1.0


def test_stopped(tmp_path):
    log = Log(tmp_path).start().train_epoch().save().end("stopped", comp=4.0)
    now = status(tmp_path, now=log.now + 3600)
    assert now.state == "stopped"
    assert now.seconds_used == pytest.approx(4.1)
    assert "--run-dir" in now.next_command


def test_between_two_phases(tmp_path):
    Log(tmp_path).start().train_epoch().decide(4.0, grow_to=(64, 2)).end("resize")
    now = status(tmp_path)
    assert now.state == "stopped"
    assert (now.ranks, now.next_ranks) == (1, 2)
    assert "1, next phase 2" in printed(now)


@pytest.mark.parametrize("left_lock", [True, False])
def test_interrupted(tmp_path, left_lock):
    log = Log(tmp_path).start().train_epoch().cut_short()
    if left_lock:
        write_lock(log, dead_pid())
    now = status(tmp_path)
    assert now.state == "interrupted"
    assert now.epoch == 1


def test_interrupted_right_after_a_resize(tmp_path):
    log = Log(tmp_path).start().end("resize")
    log.tick(2).start().event("resize", from_ranks=1, to_ranks=2, seconds=2.0)
    assert status(tmp_path).state == "interrupted"


def test_failed(tmp_path):
    Log(tmp_path).start().event("failure", reason="out of memory", rank=0, host="n1", exit_code=9)
    now = status(tmp_path)
    assert now.state == "failed"
    assert "out of memory (rank 0, on n1, exit code 9)" in now.explanation


def test_ended_by_an_error(tmp_path):
    log = Log(tmp_path).start().train_epoch().event("error", reason="lower train.lr")
    now = status(tmp_path)
    assert now.state == "failed"
    assert now.explanation.endswith(": lower train.lr")
    (interruption,) = load(tmp_path).interruptions
    assert (interruption.reason, interruption.epoch) == ("lower train.lr", 1)
    log.tick(2).start()
    assert status(tmp_path).state == "interrupted"


def test_later_process_with_the_same_pid_is_not_the_holder(tmp_path):
    log = Log(tmp_path).start()
    write_lock(log, os.getpid(), started=time.time() - 1e6)
    assert status(tmp_path).state == "interrupted"


def test_zombie_is_not_the_holder(tmp_path):
    log = Log(tmp_path).start()
    process = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    process.stdout.read()  # end of file: it has exited, and is a zombie until it is waited for
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    write_lock(log, process.pid)
    try:
        assert status(tmp_path).state == "interrupted"
    finally:
        process.communicate()


def test_lock_of_another_host_counts_as_running(tmp_path):
    log = Log(tmp_path).start()
    write_lock(log, 1, host="login7.example")
    now = status(tmp_path, now=log.now + 90)
    assert now.state == "running"
    assert "cannot be checked" in now.explanation
    assert "1 min 30 s ago" in now.explanation
    assert now.lock.live is None


def test_stop_on_another_host_counts_though_its_lock_is_left(tmp_path):
    log = Log(tmp_path).start().end("stopped")
    write_lock(log, 1, host="login7.example", started=log.now - 10)
    assert status(tmp_path).state == "stopped"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}', '{"host": "h"}', "\x00"])
def test_unreadable_lock_has_no_holder(tmp_path, content):
    log = Log(tmp_path).start()
    (log.path / "lock").write_text(content)
    assert status(tmp_path).state == "interrupted"


def test_work_undone_by_a_crash_does_not_count(tmp_path):
    log = Log(tmp_path).start().train_epoch(0.5).save()
    saved = log.step, log.samples
    log.train_epoch(0.9).event("failure", reason="x").rewind(*saved).start()
    now = status(tmp_path)
    assert (now.epoch, now.step, now.test_accuracy) == (1.0, 50, 0.5)


def test_newest_checkpoint_is_the_last_complete_one_by_name(tmp_path):
    log = Log(tmp_path).start()
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("step-0000000010-phase-000.h5", "step-0000000200-phase-001.h5"):
        (folder / name).write_bytes(b"not opened")
    for name in (".step-0000000300-phase-001.h5", "step-0000000400-phase-001.h5.part"):
        (folder / name).write_bytes(b"")
    os.utime(folder / "step-0000000200-phase-001.h5", (log.now, log.now))
    now = status(tmp_path, now=log.now + 120)
    assert now.checkpoint.name == "step-0000000200-phase-001.h5"
    assert (now.checkpoint.bytes, now.checkpoint.age_seconds) == (10, 120)
    assert "step-0000000200-phase-001.h5, 10 B, 2 min 00 s ago" in printed(now)


def test_json_has_no_nan(tmp_path):
    log = Log(tmp_path).start().train_epoch(math.nan).decide(math.nan)
    write_lock(log, os.getpid(), started=math.inf)
    values = json.loads(json.dumps(status(tmp_path).to_dict(), allow_nan=False))
    assert values["eigenvalue"] is None
    assert values["test_accuracy"] is None
    assert values["lock"]["pid"] == os.getpid()
    assert values["state"] == "running"


def test_text_of_the_user_is_not_markup(tmp_path):
    job = JOB.replace('"digits"', '"[bold]x[/nonsense]"')
    Log(tmp_path, job).start().decide(3.0, reason="[red]why[/blue]")
    shown = printed(status(tmp_path))
    assert "[bold]x[/nonsense]" in shown
    assert "[red]why[/blue]" in shown


def test_next_command_is_never_wrapped(tmp_path):
    deep = tmp_path / ("with space " + "x" * 150)
    Log(deep)
    now = status(deep)
    assert now.next_command in printed(now).splitlines()[-1]
    assert f"'{deep}'" in now.next_command


def test_not_a_run_directory_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="not a run directory"):
        status(tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        status(tmp_path / "nowhere")


def test_imports_nothing_slow():
    code = (
        "import sys, hpc_absa.status\n"
        "third = {m.partition('.')[0] for m in sys.modules} - set(sys.stdlib_module_names)\n"
        "print(sorted(third))"
    )
    out = subprocess.run(
        [sys.executable, "-I", "-c", f"sys_path = {sys.path!r}\nimport sys\n"
         f"sys.path[:] = sys_path\n{code}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    for slow in ("numpy", "matplotlib", "torch", "h5py", "pydantic", "mpi4py", "typer"):
        assert slow not in out.stdout


def test_chain_of_batch_jobs(tmp_path, monkeypatch):
    log = Log(tmp_path / "run").start().train_epoch(0.8).decide(9.5, grow_to=(64, 2)).end("resize")
    chain = Chain(RunDir(log.path), "digits")
    chain.record(Link(1, chain.name(1), "16", 1, 1, log.now))
    chain.record(Link(2, chain.name(2), "17", 2, 2, log.now))
    slurm = FakeSlurm(tmp_path)
    monkeypatch.setenv("PATH", slurm.path)
    slurm.respond("squeue", f"echo '17|{chain.name(2)}|PENDING|Resources|2'")
    now = status(log.path)
    assert now.state == "queued"
    assert now.explanation == "Job 17, link 2 of its chain, waits for Resources."
    assert now.next_command is None
    assert f"link 2, job 17 ({chain.name(2)}), 2 nodes, 2 ranks: pending" in printed(now)
    assert [link["job_id"] for link in now.to_dict()["chain"]] == ["16", "17"]
    slurm.respond("squeue", f"echo '17|{chain.name(2)}|RUNNING|None|2'")
    assert status(log.path).state == "running"
    slurm.respond("squeue", "")
    assert status(log.path).state == "stopped"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "Slurm cannot be asked from here" in status(log.path).explanation


def test_watch_prints_a_line_for_each_change_where_there_is_no_terminal(tmp_path, monkeypatch):
    log = Log(tmp_path).start().train_epoch(0.5)
    write_lock(log, os.getpid())
    changes = [
        lambda: None,
        lambda: log.train_epoch(0.6),
        lambda: log.end("done", 100).done(),
    ]
    monkeypatch.setattr(time, "sleep", lambda seconds: changes.pop(0)())
    out = io.StringIO()
    watch(tmp_path, Console(file=out, width=200))
    first, second, last = out.getvalue().splitlines()
    assert first.startswith("running · epoch 1 · step 50 · loss 0.6")
    assert second.startswith("running · epoch 2 · step 100")
    assert last.startswith("done")


def test_watch_renders_the_whole_status_on_a_terminal(tmp_path):
    whole_run(tmp_path)
    out = io.StringIO()
    watch(tmp_path, Console(file=out, width=100, force_terminal=True))
    assert "97.40 %" in out.getvalue()


def test_watch_and_json_together_are_refused(tmp_path):
    whole_run(tmp_path)
    with pytest.raises(UsageError, match="--watch: expected without --json"):
        inspecting.status(tmp_path, as_json=True, watch=True)


def test_progress_bar_fits_the_terminal_and_needs_a_step(tmp_path):
    run = RunDir(Log(tmp_path).path)
    assert progress_bar(run, 80) == ""
    Log(tmp_path).start().train_epoch(0.5).train_epoch(0.6)
    text = progress_bar(run, 120)
    assert text.startswith("████░░░░░░░░░░░░  25% · epoch 2/8 · loss 0.4 · batch 32 · ranks 1 · ")
    assert text.endswith("left")
    assert progress_bar(run, 30) == text[:30]
