"""`hpc-absa launch`: a user's own command, supervised like the ranks of a job file."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hpc_absa import cli
from hpc_absa.cli import running
from hpc_absa.config import Script
from hpc_absa.errors import UsageError
from hpc_absa.rundir import RunDir
from hpc_absa.status import status
from hpc_absa.supervisor import fork_server, launchers, run_state, supervisor
from hpc_absa.supervisor.program import ScriptProgram, make_script, name_of, read_script
from tests.mpi.jobs import final_weights
from tests.supervisor.digits import PATH, save

ROOT = Path(__file__).resolve().parents[2]

LAUNCHER = """#!/bin/sh
# mpirun as far as one process can play it: the words after @, or from the process that stands for a
# rank, are the command of a rank
while [ "$1" != @ ] && [ "$2" != -I ]; do shift; done
[ "$1" != @ ] || shift
exec "$@"
"""


@pytest.fixture(name="launch")
def _launch(tmp_path, monkeypatch, capsys):
    """Runs `hpc-absa launch` in this process with a launcher that starts a single process."""
    program = tmp_path / "a launcher"
    program.write_text(LAUNCHER)
    program.chmod(0o755)
    monkeypatch.setattr(launchers, "program", lambda name: str(program))
    monkeypatch.setattr(running, "write_report", lambda *_: None)
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in signal.Signals if number < 32}

    def launch(*words):
        begin = ["hpc-absa", "launch", "--set", 'launch.extra=["@"]']
        monkeypatch.setattr(sys, "argv", [*begin, *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    yield launch
    for number, handler in handlers.items():
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, handler)


STAND_IN = ("python", "-m", "tests.supervisor.stand_in")


def seen(tmp_path):
    """What each launch of the stand-in saw."""
    path = tmp_path / "seen"
    return list(map(json.loads, path.read_text().splitlines())) if path.exists() else []


# From the first phase to the last


def test_a_script_grows_as_its_checkpoints_say(launch, tmp_path):
    code, out, err = launch("--max-ranks", 4, "--", *STAND_IN, "two words", "--lr", "1")
    assert (code, err) == (0, ""), out
    launches = seen(tmp_path)
    assert [s["ranks"] for s in launches] == [1, 2, 4]
    assert all(s["arguments"] == ["two words", "--lr", "1"] for s in launches)
    assert all(s["folder"] == str(tmp_path) for s in launches)
    run = RunDir(tmp_path / "runs" / "stand_in")
    assert {s["HPC_ABSA_RUN_DIR"] for s in launches} == {str(run.path)}
    assert {s["HPC_ABSA_MAX_RANKS"] for s in launches} == {"4"}
    assert status(run.path).state == "done"
    assert read_script(run).command == (*STAND_IN, "two words", "--lr", "1")
    code, out, _ = launch("--max-ranks", 4, "--", *STAND_IN, "two words", "--lr", "1")
    assert (code, len(seen(tmp_path))) == (0, 3)
    assert "already done after 40 steps" in out


def test_a_script_is_forked_where_it_asks_for_it(launch, tmp_path, monkeypatch):
    monkeypatch.setattr(fork_server, "PRELOADED", ())
    monkeypatch.setattr(supervisor, "OF_SCRIPTS", ("colorsys",))
    words = ("--set", "launch.extra=[]", "--max-ranks", 2, "--set", "launch.fork_server=true")
    code, out, err = launch(*words, "--", *STAND_IN, "two words")
    assert (code, err) == (0, ""), out
    launches = seen(tmp_path)
    assert [(s["ranks"], s["process"]) for s in launches] == [
        (1, "absa-rank-0"),
        (2, "absa-rank-0"),
    ]
    assert all(s["arguments"] == ["two words"] and s["preloaded"] for s in launches)


def test_options_after_the_program_are_the_programs(launch, tmp_path):
    """Also where `--` was forgotten."""
    code, out, _ = launch("--run-dir", "r", "--ranks", 2, "--max-ranks", 2, *STAND_IN, "--fresh")
    assert code == 0, out
    assert [(s["ranks"], s["arguments"]) for s in seen(tmp_path)] == [(2, ["--fresh"])]


def test_more_initial_ranks_than_slots_share_them_and_the_settings_can_be_read(launch, tmp_path):
    words = ("--run-dir", "r", "--ranks", 4, "-H", "localhost:2", "--", *STAND_IN)
    code, out, _ = launch(*words)
    assert code == 0, out
    assert [s["ranks"] for s in seen(tmp_path)] == [4]
    ranks = read_script(RunDir(tmp_path / "r")).ranks
    assert (ranks.initial, ranks.max) == (4, 4)


def test_a_stopped_run_continues_with_its_stored_command(launch, tmp_path, monkeypatch):
    words = ("--run-dir", tmp_path / "r", "--max-ranks", 2)
    code, out, _ = launch(*words, "--", *STAND_IN, "--stop")
    assert code == 75, out
    assert status(tmp_path / "r").next_command == f"hpc-absa launch --run-dir {tmp_path}/r"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    code, out, _ = launch(*words)
    assert code == 75, out
    assert [s["ranks"] for s in seen(tmp_path)] == [1, 2, 2]
    assert seen(tmp_path)[-1]["folder"] == str(tmp_path)


def test_the_printed_command_is_the_executed_one(launch, tmp_path):
    words = ("--run-dir", "r", "--max-ranks", 1, "--set", "train.threads_per_rank=3")
    words = (*words, "--allow-changed", "a.b", "--allow-changed", "c", "--", *STAND_IN, "a b")
    _, printed, _ = launch("--dry-run", *words)
    assert not (tmp_path / "r").exists()
    (tmp_path / "r" / "logs").mkdir(parents=True)
    (tmp_path / "r" / "checkpoints").mkdir()
    subprocess.run(["sh", "-c", printed], check=True, cwd=tmp_path)
    launch("--fresh", *words)
    assert seen(tmp_path)[0] == seen(tmp_path)[1]
    assert seen(tmp_path)[0]["OMP_NUM_THREADS"] == "3"
    assert seen(tmp_path)[0]["HPC_ABSA_ALLOW_CHANGED"] == "a.b,c"
    (log,) = RunDir(tmp_path / "r").logs.glob("world-*.log")
    assert log.read_text().splitlines()[0] == f"$ {printed.rstrip()}"


@pytest.mark.mpi
def test_a_script_that_exits_within_its_loop_is_not_restarted(tmp_path):
    script = tmp_path / "leaves.py"
    script.write_text(
        "import sys, torch, hpc_absa as absa\n"
        "model = torch.nn.Linear(1, 1)\n"
        "with absa.Run(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),\n"
        "              schedule=absa.FB(base_batch=2), epochs=1, microbatch=2,\n"
        "              dataset=[torch.ones(1)] * 4) as run:\n"
        "    for step in run:\n"
        "        sys.exit(0)\n"
    )
    words = [sys.executable, "-m", "hpc_absa", "launch", "--run-dir", "D", "--max-ranks", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*words, "--", "python", str(script)],
        cwd=tmp_path, env=environment, timeout=120, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "the script exited with status 0 within" in done.stdout + done.stderr
    assert "restart 1" not in done.stdout


@pytest.mark.mpi
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_rank_of_a_script_costs_no_bit(tmp_path, ranks):
    """Against the same script alone, which is not killed any more."""
    script = Path(__file__).with_name("elastic_script.py")
    words = [sys.executable, "-m", "hpc_absa", "launch", "--run-dir", "r"]
    words += [f"--ranks={ranks}", f"--max-ranks={ranks}", "--", "python", str(script), "killed"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert f"failed: rank {ranks - 1} on" in done.stdout
    assert "killed by SIGKILL" in done.stdout
    assert "restart 1 of 3" in done.stdout
    run = RunDir(tmp_path / "r")
    starts = [e for e in run.log.read() if e["event"] == "phase_start"]
    assert {e["ranks"] for e in starts} == {ranks}
    assert status(run.path).failures == 1
    alone = subprocess.run([sys.executable, script, "killed"], cwd=tmp_path, env=environment)
    assert alone.returncode == 0
    weights = final_weights(tmp_path / "runs" / "elastic_script")
    assert np.array_equal(weights, final_weights(run.path))


# What goes wrong in the script


@pytest.mark.parametrize(
    ("word", "code", "launches", "line"),
    [
        ("--no-run", 2, 1, "exited without a hpc_absa.Run, so there is nothing to supervise"),
        ("--left", 1, 1, "exited before its hpc_absa.Run was at its end"),
        (
            "--broken",
            1,
            2,
            "exited with status 1 before its hpc_absa.Run began: "
            "ImportError: no module of that name",
        ),
        ("--late", 1, 1, "exited with status 1 after its hpc_absa.Run had ended (done)"),
    ],
)
def test_a_script_that_does_not_end_its_run(launch, tmp_path, word, code, launches, line):
    status_, out, err = launch("--max-ranks", 1, "--", *STAND_IN, word)
    assert (status_, len(seen(tmp_path))) == (code, launches)
    assert line in out + err
    assert "Traceback" not in err
    if word == "--broken":
        assert "raise ImportError" in out
        assert "failed twice in the same way before its hpc_absa.Run" in out
    if word == "--late":
        assert status(Path("runs/stand_in")).state == "done"


@pytest.mark.parametrize(
    ("word", "code", "line"),
    [
        ("--refused", 1, "the state could not be saved"),
        ("--unsaved", 75, "stopped without saving; run the same command to continue"),
    ],
)
def test_a_stop_without_saving_is_not_shown_as_saved(launch, monkeypatch, word, code, line):
    monkeypatch.setenv("SUPERVISOR", str(os.getpid()))
    status_, out, err = launch("--max-ranks", 1, "--", *STAND_IN, word)
    assert status_ == code
    assert line in out + err
    assert "everything saved" not in out
    events = RunDir(Path("runs/stand_in")).log.read()
    assert [e["reason"] for e in events if e["event"] == "error"] == [line] * (word == "--refused")


def test_a_record_that_was_not_written_does_not_hide_the_reason_of_the_next_failure(launch):
    """A full disk left an empty file, and ranks do not replace one that is there."""
    restarts = ("--set", "launch.max_restarts=1")
    code, out, err = launch("--max-ranks", 1, *restarts, "--", *STAND_IN, "--unwritten")
    assert code == 1, out + err
    run = RunDir(Path("runs/stand_in"))
    reasons = [e["reason"] for e in run.log.read() if e["event"] == "failure"]
    assert "exited with status 3 within its hpc_absa.Run" in reasons[0]
    assert reasons[1:] == ["no memory"]
    assert not run.failure.exists()


# What is refused before the start


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "launch: no command; expected one after --"),
        (["--run-dir", "none"], "launch: no command; expected one after --"),
        (["--", "no-such-program"], "launch: no-such-program: no such program on PATH"),
        (["--", "./none.sh"], "launch: ./none.sh: no such file in"),
        (["--", "python", "none.py", "--lr", "1"], "launch: none.py: no such file in"),
        (["--", "train.py"], "launch: train.py: not executable; expected: python train.py"),
        (["--", "./train.sh"], "launch: ./train.sh: not executable; expected: chmod +x ./train.sh"),
        (["--set", "train.lr=1", "--", "true"], "launch: train.lr = 1: unknown key"),
        (["--set", "ranks.max=0", "--", "true"], "launch: ranks.max = 0: expected"),
        (["--run-dir", "foreign", "--", "true"], "it has a launch.toml, and is not a run"),
        (["--run-dir", "job", "--", "true"], "a run of the job file 'digits', not of a script"),
        (["--run-dir", "train.py", "--", "true"], "train.py: is a file"),
    ],
)
def test_one_line_says_what_is_wrong(launch, tmp_path, words, line):
    for name in ("train.py", "train.sh", "foreign/launch.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    job = RunDir(tmp_path / "job").create()
    job.write_job(PATH.read_text())
    job.checkpoint(10, 1).touch()
    code, _, err = launch(*words)
    assert code == 2
    assert line in err
    assert len(err.splitlines()) == 1
    assert (tmp_path / "foreign/launch.toml").read_text() == "x = 1\n"


def program(*words, allow=(), **ranks):
    overrides = tuple(f"ranks.{key}={value}" for key, value in ranks.items())
    return ScriptProgram(make_script(words, None, None, overrides), allow)


@pytest.fixture(name="saved")
def _saved(tmp_path, monkeypatch):
    """A run of `true` with a batch of 128, which feeds four ranks."""
    monkeypatch.chdir(tmp_path)
    run = RunDir(tmp_path / "r").create()
    program("true").write(run)
    run.write_job(PATH.read_text().replace('name = "digits"', 'name = "script"'))
    save(run, 10, global_batch=128, next_ranks=2, rank_limit=2)
    return run


def test_another_command_does_not_continue_a_run(saved, tmp_path, monkeypatch):
    message = (
        "another command: 'true' there, 'true --lr 2' here; use another --run-dir, --fresh to "
        "start over, or --allow-changed command"
    )
    with pytest.raises(UsageError, match=message):
        program("true", "--lr", "2").write(saved)
    program("true", "--lr", "2", allow=("command",)).write(saved)
    assert read_script(saved).command == ("true", "--lr", "2")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    with pytest.raises(UsageError, match=r"another directory: .* or --allow-changed directory"):
        program("true", "--lr", "2").write(saved)


def test_a_run_begun_without_a_supervisor_is_continued(saved):
    saved.launch.unlink()
    program("true", "--lr", "2").write(saved)
    assert saved.is_script


def test_a_command_that_never_saved_may_be_corrected(tmp_path):
    run = RunDir(tmp_path / "r").create()
    for word in ("false", "true"):
        program(word).write(run)
    assert read_script(run).command == ("true",)


def test_the_ranks_are_those_of_the_checkpoint(saved):
    for limit, ranks in ((2, 2), (4, 4), (3, 2)):
        assert run_state.next_ranks(program("true"), saved, limit) == ranks
    assert run_state.next_ranks(program("true", initial=3), saved, 4) == 4
    assert run_state.next_ranks(program("true", initial=3), RunDir(saved.path / "new"), 4) == 3


@pytest.mark.parametrize(("limit", "ranks"), [(1, 1), (2, 2), (4, 2), (8, 2)])
def test_the_scripts_own_largest_number_of_ranks_is_held(saved, limit, ranks):
    """Its batch would feed four."""
    saved.write_job(saved.job.read_text().replace("max = 4", "max = 2"))
    assert run_state.next_ranks(program("true", max=limit), saved, limit) == ranks
    assert run_state.next_ranks(program("true"), saved, limit) == ranks


# Parts


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("python train.py", "train"),
        ("python -u ../src/lm.py train.py", "lm"),
        ("python -m package.train --out x.py", "train"),
        ("./run.sh", "run"),
        ("bash scripts/all.sh", "all"),
        ("/opt/bin/solver --fast", "solver"),
    ],
)
def test_a_run_is_named_by_its_script(command, name):
    assert name_of(command.split()) == name


def test_python_is_the_one_that_supervises(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    script = make_script(["python", "-c", "1"], None, None, ())
    worker = ScriptProgram(script).worker(RunDir(tmp_path / "r"), 3)
    assert worker.words == (str(Path(sys.executable).parent / "python"), "-c", "1")
    assert worker.directory == str(tmp_path)


def test_settings_come_from_a_file_and_from_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "site.toml"
    file.write_text('[launch]\nlauncher = "slurm"\n[launch.slurm]\npartition = "gpu"\n')
    script = make_script(["true"], None, file, ("launch.slurm.partition=cpu", "ranks.max=8"))
    assert script.launch.slurm.partition == "cpu"
    assert (script.launch.launcher, script.ranks.max) == ("slurm", 8)
    file.write_text("[lanch]\n")
    with pytest.raises(UsageError, match=r"site\.toml: lanch = {}: unknown key"):
        make_script(["true"], None, file, ())


def test_ranks_on_other_hosts_get_the_run_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(launchers, "program", lambda name: name)
    launch = {"hosts": "a:2,b:2"}
    script = Script.model_validate(
        {"name": "x", "command": ["true"], "directory": str(tmp_path), "launch": launch}
    )
    worker = ScriptProgram(script).worker(RunDir(tmp_path / "r"), 4)
    started = launchers.command(script, 4, worker)
    line = " ".join(started.words)
    assert "-x HPC_ABSA_RUN_DIR -x HPC_ABSA_MAX_RANKS" in line
    assert started.environment["HPC_ABSA_MAX_RANKS"] == "4"
    assert str(started).startswith(f"cd {tmp_path} && ") is (os.getcwd() != str(tmp_path))


def test_the_traceback_of_the_script_is_shown(saved):
    """That of the last launch, at the end of a log of its ranks."""
    trace = "Traceback (most recent call last):\n  File x\nValueError: mine\n"
    saved.rank_log(1, 0).write_text(f"a line\n{trace.replace('mine', 'old')}more\n{trace}")
    saved.rank_log(1, 1).write_text("no exception\n")
    shown = program("true").traceback(saved, None, since=0)
    assert shown == trace.splitlines()
    assert program("true").traceback(saved, 1, since=0) == []
    saved.rank_log(1, 1).write_text("Traceback (most recent call last):\n  File of a thread\n")
    assert program("true").traceback(saved, 1, since=0) == []
    assert program("true").traceback(saved, 0, since=time.time() + 60) == []


def test_the_job_of_a_script_is_not_run_as_a_job_file(saved, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hpc-absa", "run", str(saved.job)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert f"continue it with hpc-absa launch --run-dir {saved.path}" in capsys.readouterr().err
