"""`hpc-absa run` as a user sees it: real worlds, real kills, real signals."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from hpc_absa import config
from hpc_absa.errors import UsageError
from hpc_absa.rundir import RunDir
from hpc_absa.rundir.lock import host
from hpc_absa.supervisor import driver
from tests.mpi.jobs import final_weights, relative_difference, write_job
from tests.supervised import Supervised

pytestmark = pytest.mark.mpi


class Run(Supervised):
    """One of the small job unless told, whose ranks can be found."""

    def __init__(self, folder: Path, *words: str, job: Path | None = None, **environment: str):
        job, run = job or write_job(folder), RunDir(folder / "run")
        super().__init__(job, run, *words, environment=os.environ | environment)

    def ranks(self) -> list[int]:
        """Process ids of the living ranks."""
        mine = f"--run-dir\0{self.run.path}\0".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes()
            except OSError:
                continue
            if mine in words and b"\0train\0" in words and b"mpirun" not in words:
                found.append(int(path.parent.name))
        return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Final weights of the small job, 1 → 2 → 4 ranks; its events are looked at by a test."""
    run = Run(tmp_path_factory.mktemp("undisturbed")).start()
    code, output = run.finish()
    assert code == 0, output
    return run, output


def test_a_job_grows_through_three_worlds(undisturbed):
    run, output = undisturbed
    starts = run.events("phase_start")
    assert [(e["ranks"], e["global_batch"]) for e in starts] == [(1, 32), (2, 64), (4, 128)]
    assert [(e["from_ranks"], e["to_ranks"]) for e in run.events("resize")] == [(1, 2), (2, 4)]
    assert "batch 32 → 64, ranks 1 → 2" in output
    grown = [e["reason"] for e in run.events("decision") if e["action"] == "grow"]
    assert [reason.split(", ")[-1] for reason in grown] == ["ranks 1 → 2", "ranks 2 → 4"]
    assert [e["epoch"] for e in run.events("epoch")] == [1, 2, 3, 4]
    assert (
        run.events("done")[0]["steps"] == starts[-1]["step"] + run.events("phase_end")[-1]["steps"]
    )
    assert run.run.report.stat().st_size > 10_000
    assert run.run.figure.read_bytes().startswith(b"\x89PNG")
    assert list(run.run.tensorboard.glob("events.out.tfevents.*"))
    assert len(list(run.run.logs.glob("phase-003-rank-*.log"))) == 4


def test_events_account_for_every_second_of_a_phase(undisturbed):
    run, _ = undisturbed
    for start, end in zip(run.events("phase_start"), run.events("phase_end"), strict=True):
        seconds = end["seconds"]
        worked = sum(seconds.values()) - seconds["start"]
        assert worked == pytest.approx(end["time"] - start["time"], rel=0.1, abs=0.3)


def test_again_on_a_finished_run_there_is_nothing_to_do(undisturbed):
    run, _ = undisturbed
    code, output = run.start().finish(20)
    assert code == 0
    assert "already done" in output


@pytest.mark.parametrize("victim", [0, pytest.param(-1, marks=pytest.mark.slow)])
def test_a_killed_rank_costs_a_restart_and_nothing_else(tmp_path, undisturbed, victim):
    run = Run(tmp_path, "--max-ranks", "2").start()
    run.wait_for("phase_start", 2)
    run.wait_for("checkpoint", 1)
    os.kill(sorted(run.ranks())[victim], signal.SIGKILL)
    code, output = run.finish()
    assert code == 0, output
    assert "restart 1 of 3" in output
    (failure,) = run.events("failure")
    assert failure["reason"] == "killed by SIGKILL"
    assert failure["rank"] in (0, 1)
    assert failure["exit_code"] == 137
    weights = final_weights(undisturbed[0].run.path)
    assert relative_difference(weights, final_weights(run.run.path)) < 1e-4


def test_a_rank_that_does_not_answer_is_named_and_its_world_started_again(tmp_path, undisturbed):
    silence = ("--set", "launch.heartbeat_timeout=3", "--set", "ranks.initial=2")
    run = Run(tmp_path, "--max-ranks", "2", *silence).start()
    run.wait_for("phase_start")
    os.kill(max(run.ranks()), signal.SIGSTOP)
    code, output = run.finish()
    assert code == 0, output
    (failure,) = run.events("failure")
    assert re.fullmatch(r"rank 1 on \S+ has not answered for \d+ s", failure["reason"])
    assert (failure["rank"], failure["host"]) == (1, host())
    weights = final_weights(undisturbed[0].run.path)
    assert relative_difference(weights, final_weights(run.run.path)) < 1e-4


def test_a_rank_that_gets_nowhere_is_named_and_its_world_started_again(tmp_path, undisturbed):
    """The first world's second rank loops in its loss, once it has taken some steps."""
    (tmp_path / "looping.py").write_text(
        "import os, pathlib, torch\n"
        "once, calls = pathlib.Path(__file__).with_name('once'), []\n"
        "def loss(outputs, targets):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 5 and os.environ.get('OMPI_COMM_WORLD_RANK') == '1':\n"
        "        while once.exists():\n"
        "            pass\n"
        "    return torch.nn.functional.cross_entropy(outputs, targets)\n"
    )
    once = tmp_path / "once"
    once.touch()
    words = []
    for setting in ("train.loss=looping:loss", "launch.progress_timeout=3", "ranks.initial=2"):
        words += ["--set", setting]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    run = Run(tmp_path, "--max-ranks", "2", *words, PYTHONPATH=path).start()
    run.wait_for("failure")
    once.unlink()
    code, output = run.finish()
    assert code == 0, output
    (failure,) = run.events("failure")
    assert re.fullmatch(
        r"rank 1 on \S+ has been computing one microbatch for \d+ s", failure["reason"]
    )
    assert (failure["rank"], failure["host"]) == (1, host())
    assert "looping.py" in run.run.rank_log(1, 1).read_text()
    weights = final_weights(undisturbed[0].run.path)
    assert relative_difference(weights, final_weights(run.run.path)) < 1e-4


def test_a_world_whose_ranks_do_not_find_each_other_is_ended(tmp_path):
    """mpirun starts something else, which hangs."""
    job = write_job(tmp_path)
    extra = 'launch.extra=["sh", "-c", "sleep 600"]'
    limits = ("--set", "launch.start_seconds=2", "--set", "launch.max_restarts=0")
    code, output = Run(tmp_path, "--set", extra, *limits, job=job).start().finish(60)
    assert code == 1
    assert "failed: its ranks had not found each other after 2 s" in output


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGTERM, signal.SIGUSR1)),
    ],
)
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path, undisturbed, number):
    run = Run(tmp_path, "--max-ranks", "2").start()
    run.wait_for("epoch", 1)
    run.process.send_signal(number)
    code, output = run.finish()
    assert code == 75, output
    assert "the same command goes on" in output
    assert run.events("phase_end")[-1]["outcome"] in ("stopped", "resize")
    code, output = run.start().finish()
    assert code == 0, output
    weights = final_weights(undisturbed[0].run.path)
    assert relative_difference(weights, final_weights(run.run.path)) < 1e-4


def test_a_killed_supervisor_leaves_a_run_that_goes_on(tmp_path, undisturbed):
    run = Run(tmp_path, "--max-ranks", "2").start()
    run.wait_for("epoch", 2)
    run.process.kill()
    run.process.communicate()
    code, output = run.start().finish(180)
    assert code == 0, output
    weights = final_weights(undisturbed[0].run.path)
    assert relative_difference(weights, final_weights(run.run.path)) < 1e-4


def test_a_second_supervisor_is_refused(tmp_path):
    run = Run(tmp_path).start()
    run.wait_for("phase_start")
    for words in (run.words, [*run.words, "--fresh"]):
        second = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert second.returncode == 1
        assert f"in use by process {run.process.pid} on" in second.stderr
    assert run.events("phase_start"), "--fresh removed a living run"
    run.process.send_signal(signal.SIGINT)
    assert run.finish()[0] == 75


def faulty(folder: Path, body: str) -> Run:
    (folder / "faulty.py").write_text(f"import torch\ndef loss(outputs, targets):\n    {body}\n")
    job = write_job(folder)
    job.write_text(job.read_text().replace("[train]\n", '[train]\nloss = "faulty:loss"\n'))
    return Run(folder, "--set", "launch.max_restarts=1", job=job, PYTHONPATH=str(folder))


def test_a_job_that_cannot_go_on_is_given_up(tmp_path):
    code, output = faulty(tmp_path, "raise ArithmeticError('on purpose')").start().finish()
    assert code == 1
    assert "failed: rank 0 on" in output
    assert "ArithmeticError: on purpose" in output
    assert output.count("restart 1 of 1") == 1
    assert "gave up after 1 restarts without progress" in output


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.widht=3", "model.widht"),
        ("data.name=imagefolder", "data.root"),
    ],
)
def test_a_users_mistake_costs_one_line_and_exit_2(tmp_path, override, message):
    code, output = Run(tmp_path, "--set", override).start().finish()
    assert code == 2, output
    (line,) = output.strip().splitlines()
    assert line.startswith("hpc-absa: ")
    assert message in line


def test_without_horovod_nothing_is_started(tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "find_spec", lambda name: None)
    run = RunDir(tmp_path / "run")
    with pytest.raises(UsageError, match="Horovod is not installed"):
        driver.Supervisor(config.load(write_job(tmp_path)), run, ()).supervise()
    assert not run.path.exists()


def test_a_changed_job_is_refused_and_a_fresh_one_begins_anew(tmp_path, undisturbed):
    done, _ = undisturbed
    run = Run(tmp_path, "--set", "train.lr=0.01")
    run.run.create()
    run.run.job.write_bytes(done.run.job.read_bytes())
    for path in done.run.checkpoints.glob("*.h5"):
        (run.run.checkpoints / path.name).write_bytes(path.read_bytes())
    code, output = run.start().finish(30)
    assert code == 2
    assert "train.lr = 0.05 there, 0.01 here" in output
    dry = subprocess.run(
        [*run.words, "--fresh", "--dry-run"], capture_output=True, text=True, timeout=30
    )
    assert dry.returncode == 0
    assert " -np 1 " in dry.stdout
    assert json.dumps(str(run.run.job))[1:-1] in dry.stdout


@pytest.mark.slow
def test_horovodrun_launches_the_same_job(tmp_path, undisturbed):
    code, output = Run(tmp_path, "--launcher", "horovodrun").start().finish(180)
    assert code == 0, output
    weights = final_weights(undisturbed[0].run.path)
    assert relative_difference(weights, final_weights(tmp_path / "run")) < 1e-4
