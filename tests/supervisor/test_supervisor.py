"""`hpc-absa run` as a user sees it: real ranks, real kills, real signals."""

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
from hpc_absa.status import status
from hpc_absa.supervisor import supervisor
from hpc_absa.supervisor.program import JobProgram
from tests.mpi.jobs import final_weights, relative_difference, write_job
from tests.supervised import Supervised, processes

pytestmark = pytest.mark.mpi


class Run(Supervised):
    """Of the small job by default, with access to its ranks."""

    def __init__(self, folder: Path, *words: str, job: Path | None = None, **environment: str):
        job, run = job or write_job(folder), RunDir(folder / "run")
        super().__init__(job, run, *words, environment=os.environ | environment)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The small job on 1, 2 and 4 ranks; meanwhile a second supervisor tries to take it over."""
    run = Run(tmp_path_factory.mktemp("undisturbed")).start()
    run.wait_for("phase_start")
    run.first_pid = run.process.pid
    run.second = [
        subprocess.run(words, capture_output=True, text=True, timeout=60)
        for words in (run.words, [*run.words, "--fresh"])
    ]
    code, output = run.finish()
    assert code == 0, output
    return run, output


def test_a_job_grows_through_three_phases(undisturbed):
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
    rehearsals = [end["seconds"]["rehearsal"] for end in run.events("phase_end")]
    assert rehearsals[0] > 0
    assert rehearsals[1:] == [0, 0]


def test_events_account_for_every_second_of_a_phase(undisturbed):
    run, _ = undisturbed
    for start, end in zip(run.events("phase_start"), run.events("phase_end"), strict=True):
        seconds = end["seconds"]
        worked = sum(seconds.values()) - seconds["start"]
        assert worked == pytest.approx(end["time"] - start["time"], rel=0.1, abs=0.3)


def test_the_same_command_does_nothing_on_a_finished_run(undisturbed):
    run, _ = undisturbed
    code, output = run.start().finish(20)
    assert code == 0
    assert "already done" in output


@pytest.mark.parametrize("victim", [0, pytest.param(-1, marks=pytest.mark.slow)])
def test_a_killed_rank_costs_one_restart(tmp_path, undisturbed, victim):
    run = Run(tmp_path, "--max-ranks", "2").start()
    run.wait_for("phase_start", 2)
    run.wait_for("checkpoint", 1)
    os.kill(run.ranks()[victim], signal.SIGKILL)
    code, output = run.finish()
    assert code == 0, output
    assert "restart 1 of 3" in output
    (failure,) = run.events("failure")
    assert failure["reason"] == "killed by SIGKILL"
    assert failure["rank"] in (0, 1)
    assert failure["exit_code"] == 137
    assert 0 < failure["seconds"] < 3  # mpirun itself takes six
    (restart,) = run.events("restart")
    assert restart["to_ranks"] == 2
    assert restart["seconds"] == pytest.approx(restart["time"] - failure["time"], abs=0.1)
    assert [end["seconds"]["rehearsal"] for end in run.events("phase_end")][-1] == 0
    weights = final_weights(undisturbed[0].run.path)
    assert relative_difference(weights, final_weights(run.run.path)) < 1e-4


NO_RESTART = ("--max-ranks", "2", "--set", "ranks.initial=2", "--set", "launch.max_restarts=0")


def test_a_rank_that_does_not_answer_is_named_and_its_ranks_are_ended(tmp_path):
    run = Run(tmp_path, *NO_RESTART, "--set", "launch.heartbeat_timeout=3").start()
    run.wait_for("phase_start")
    for pid, words in processes(run.run).items():
        if "forked_rank" in words and "mpirun" not in words:
            os.kill(pid, signal.SIGSTOP)  # it would notice a rank that is stopped after 2 s
    os.kill(run.ranks()[-1], signal.SIGSTOP)
    assert run.finish()[0] == 1
    (failure,) = run.events("failure")
    assert re.fullmatch(r"rank 1 on \S+ has not answered for \d+ s", failure["reason"])
    assert (failure["rank"], failure["host"]) == (1, host())
    assert processes(run.run) == {}


def test_a_rank_without_progress_is_named_and_its_ranks_are_ended(tmp_path):
    """Rank 1 loops in its loss function after some steps."""
    (tmp_path / "looping.py").write_text(
        "import os, torch\n"
        "calls = []\n"
        "def loss(outputs, targets):\n"
        "    calls.append(1)\n"
        "    while len(calls) == 25 and os.environ.get('OMPI_COMM_WORLD_RANK') == '1':\n"
        "        pass\n"
        "    return torch.nn.functional.cross_entropy(outputs, targets)\n"
    )
    words = [*NO_RESTART, "--set", "train.loss=looping:loss", "--set", "launch.progress_timeout=3"]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    run = Run(tmp_path, *words, PYTHONPATH=path).start()
    assert run.finish()[0] == 1
    (failure,) = run.events("failure")
    assert re.fullmatch(
        r"rank 1 on \S+ has been computing one microbatch for \d+ s", failure["reason"]
    )
    assert (failure["rank"], failure["host"]) == (1, host())
    assert "looping.py" in run.run.rank_log(1, 1).read_text()
    assert processes(run.run) == {}


def test_ranks_that_do_not_connect_in_time_are_ended(tmp_path):
    """mpirun starts something else, which hangs."""
    job = write_job(tmp_path)
    extra = 'launch.extra=["sh", "-c", "sleep 600"]'
    limits = ("--set", "launch.start_seconds=1", "--set", "launch.max_restarts=0")
    code, output = Run(tmp_path, "--set", extra, *limits, job=job).start().finish(60)
    assert code == 1
    assert "failed: the ranks had not connected to each other after 1 s" in output


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGTERM, signal.SIGUSR1)),
    ],
)
def test_a_signal_saves_and_the_same_command_continues(tmp_path, undisturbed, number):
    run = Run(tmp_path, "--max-ranks", "2").start()
    run.wait_for("epoch", 1)
    run.process.send_signal(number)
    code, output = run.finish()
    assert code == 75, output
    assert "run the same command to continue" in output
    assert processes(run.run) == {}
    assert run.events("phase_end")[-1]["outcome"] in ("stopped", "resize")
    code, output = run.start().finish()
    assert code == 0, output
    weights = final_weights(undisturbed[0].run.path)
    assert relative_difference(weights, final_weights(run.run.path)) < 1e-4


def test_after_a_killed_supervisor_the_same_command_continues(tmp_path, undisturbed):
    run = Run(tmp_path, "--max-ranks", "2").start()
    run.wait_for("epoch", 2)
    run.process.kill()
    run.process.communicate()
    code, output = run.start().finish(180)
    assert code == 0, output
    weights = final_weights(undisturbed[0].run.path)
    assert relative_difference(weights, final_weights(run.run.path)) < 1e-4


def test_a_second_supervisor_is_refused(undisturbed):
    run, _ = undisturbed
    for second in run.second:
        assert second.returncode == 1
        assert f"in use by process {run.first_pid} on" in second.stderr
    assert len(run.events("phase_start")) == 3, "--fresh removed a running run"


def faulty(folder: Path, body: str, after: int = 0) -> Run:
    """A run whose loss function does this after so many calls."""
    (folder / "faulty.py").write_text(
        "import torch\n"
        "calls = []\n"
        "def loss(outputs, targets):\n"
        "    calls.append(1)\n"
        f"    if len(calls) > {after}: {body}\n"
        "    return torch.nn.functional.cross_entropy(outputs, targets)\n"
    )
    job = write_job(folder)
    job.write_text(job.read_text().replace("[train]\n", '[train]\nloss = "faulty:loss"\n'))
    return Run(folder, "--set", "launch.max_restarts=1", job=job, PYTHONPATH=str(folder))


def test_a_job_that_always_fails_is_given_up(tmp_path):
    code, output = faulty(tmp_path, "raise ArithmeticError('on purpose')", 25).start().finish()
    assert code == 1
    assert "failed: rank 0 on" in output
    assert "ArithmeticError: on purpose" in output
    assert output.count("restart 1 of 1") == 1
    assert "gave up after 1 restarts without progress" in output


def test_a_loss_that_always_fails_is_one_line_and_exit_2(tmp_path):
    """Found by the rehearsal: there is no restart, and no traceback of each rank."""
    code, output = faulty(tmp_path, "raise ArithmeticError('on purpose')").start().finish()
    assert code == 2, output
    assert output.count("ArithmeticError: on purpose") == 1
    assert re.search(r"train\.loss = 'faulty:loss'.*\(.*faulty\.py:5\)", output)
    assert "Traceback" not in output
    assert "restart" not in output


def test_a_loss_that_is_not_finite_is_one_line_and_exit_1(tmp_path):
    """All ranks have the same sum, so that there is no restart either."""
    run = faulty(tmp_path, "return (outputs * torch.inf).sum()", 25).start()
    code, output = run.finish()
    assert code == 1, output
    assert len(re.findall(r"the loss is not finite at step \d+", output)) == 1
    assert "restart" not in output
    (event,) = run.events("nonfinite_loss")
    assert event["action"] == "stop"
    current = status(run.run.path)
    assert current.state == "failed"
    assert f"The loss is not finite since step {event['step']}." in current.explanation


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs=1 --set schedule.base_batch=2048 --set schedule.max_batch=2048", "no step"),
        ("model.widht=3", "model.widht"),
        ("data.name=imagefolder", "data.root"),
    ],
)
def test_a_mistake_in_the_job_is_one_line_and_exit_2(tmp_path, override, message):
    code, output = Run(tmp_path, "--set", *override.split()).start().finish()
    assert code == 2, output
    (line,) = output.strip().splitlines()
    assert line.startswith("hpc-absa: ")
    assert message in line


def test_without_horovod_nothing_is_started(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "find_spec", lambda name: None)
    run = RunDir(tmp_path / "run")
    with pytest.raises(UsageError, match="Horovod is not installed"):
        supervisor.Supervisor(JobProgram(config.load(write_job(tmp_path))), run).supervise()
    assert not run.path.exists()


def test_a_changed_job_is_refused_and_fresh_starts_from_the_beginning(tmp_path, undisturbed):
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
