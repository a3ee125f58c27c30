"""The command line: exit statuses, one line an error, JSON alone, a quick start."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import hpc_absa
from hpc_absa import cli
from hpc_absa.checkpoint import write
from tests.checkpoint.contents import content

JOB = Path(__file__).parents[1] / "jobs" / "digits.toml"
COMMANDS = typer.main.get_command(cli.app).commands
HEAVY = ("torch", "horovod", "mpi4py", "h5py", "scipy", "sklearn", "matplotlib")


@pytest.fixture(name="command")
def _command(monkeypatch, capsys):
    """Runs a command in this process: exit status, standard output, standard error."""

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["hpc-absa", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setenv("NO_COLOR", "1")
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    return command


# Help


def test_the_commands_of_the_contract_are_there():
    assert {
        "run",
        "train",
        "plan",
        "status",
        "verify",
        "compare",
        "report",
        "data",
        "replay",
    } <= COMMANDS.keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_every_argument_and_says_what_each_is(command, name):
    status, out, _ = command(name, "--help")
    assert status == 0
    assert COMMANDS[name].help.split("\n")[0].split(":")[0] in out
    parameters = COMMANDS[name].params
    assert parameters
    for parameter in parameters:
        is_option = parameter.param_type_name == "option"
        shown = parameter.opts if is_option else [parameter.metavar or parameter.name]
        assert all(word.lower() in out.lower() for word in shown), parameter.name
        assert parameter.help, parameter.name


def test_no_command_shows_the_help(command):
    status, out, err = command()
    assert status == 2
    assert all(name in out for name in COMMANDS)
    assert err == ""


def test_version(command):
    assert command("--version") == (0, f"hpc-absa {hpc_absa.__version__}\n", "")


# Errors


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["plam"], "No such command 'plam'"),
        (["plan"], "Missing argument 'JOB'"),
        (["plan", JOB, "extra"], "Got unexpected extra argument"),
        (["plan", JOB, "--sampels", "3"], "No such option: --sampels"),
        (["plan", JOB, "--samples", "0"], "Invalid value for '--samples'"),
        (["plan", JOB, "--samples", "many"], "Invalid value for '--samples'"),
        (["plan", JOB, "--set"], "'--set' requires an argument"),
        (["plan", "none.toml"], "none.toml: cannot be read as a job file"),
        (["plan", JOB, "--set", "train.epoch=3"], "train.epoch = 3: unknown key"),
        (["plan", JOB, "--set", "data.name=my.own:data"], "data.name = 'my.own:data': its size"),
        (["plan", JOB, "--set", "launch.hosts=a:x"], "launch.hosts = 'a:x': expected host"),
        (["train", JOB], "Missing option '--run-dir'"),
        (["run", JOB, "--launcher", "ssh", "--dry-run"], "launch.launcher = 'ssh': expected"),
        (["run", JOB, "--max-ranks", "0"], "Invalid value for '--max-ranks'"),
        (["status"], "Missing argument 'D'"),
        (["--bogus"], "No such option: --bogus"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(command, words, line):
    status, out, err = command(*words)
    assert status == 2
    assert out == ""
    assert line in err
    assert err.startswith("hpc-absa: ")
    assert err.count("\n") == 1


def test_ctrl_c_is_a_stop(command, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupt)
    assert command("plan", JOB)[0] == 75


# Commands


def test_plan_prints_one_json_object(command):
    status, out, err = command("plan", JOB, "--json", "--set", "schedule.method=absa")
    assert (status, err) == (0, "")
    told = json.loads(out)
    assert told["earliest"]["steps"] < told["latest"]["steps"]
    for course in (told["earliest"], told["latest"]):
        assert course["steps"] == sum(phase["steps"] for phase in course["phases"])
        assert set(course["phases"][0]) == {"epochs", "steps", "global_batch", "ranks", "lr"}


def test_plan_of_a_fixed_course_has_its_steps_at_the_top(command):
    status, out, _ = command(
        "plan",
        JOB,
        "--json",
        "--samples",
        "50000",
        "--set",
        "train.epochs=90",
        "--set",
        "train.microbatch=128",
        "--set",
        "train.milestones=[]",
        "--set",
        "schedule={method='bl', base_batch=640}",
    )
    assert status == 0
    told = json.loads(out)
    assert told["steps"] == 7031
    assert [phase["steps"] for phase in told["phases"]] == [7031]


def test_plan_for_people_names_the_steps(command):
    status, out, _ = command("plan", JOB, "--set", "schedule.max_batch=32")
    assert status == 0
    assert "SGD iterations" in out


def test_a_dry_run_prints_the_launch_and_starts_nothing(command, tmp_path):
    status, out, _ = command("run", JOB, "--dry-run", "--run-dir", tmp_path / "r")
    assert status == 0
    assert "mpirun" in out
    assert " train " in out
    assert not (tmp_path / "r").exists()


@pytest.fixture(name="checkpoints")
def _checkpoints(tmp_path):
    """A run directory with two checkpoints."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    paths = [folder / f"step-{step:010d}-phase-001.h5" for step in (1, 2)]
    for step, path in enumerate(paths, 1):
        write(path, content(step))
    return paths


def test_verify_good(command, checkpoints, tmp_path):
    one, two = checkpoints
    assert command("verify", one) == (0, f"{one}: good\n", "")
    assert command("verify", tmp_path) == (0, f"{one}: good\n{two}: good\n", "")
    assert command("verify", one.parent)[0] == 0


def test_verify_damaged_names_each(command, checkpoints, tmp_path):
    one, two = checkpoints
    os.truncate(two, 1000)
    status, out, _ = command("verify", tmp_path)
    assert status == 1
    assert f"{one}: good\n{two}: damaged: " in out
    status, out, _ = command("verify", tmp_path, "--json")
    assert status == 1
    good, bad = json.loads(out)["checkpoints"]
    assert good == {"path": str(one), "good": True, "error": None}
    assert bad["path"] == str(two)
    assert not bad["good"]
    assert bad["error"].startswith("damaged: ")


def test_verify_what_is_no_checkpoint(command, tmp_path):
    (tmp_path / "text").write_text("hello")
    assert command("verify", tmp_path / "text")[0] == 2
    assert command("verify", tmp_path / "none")[0] == 2
    assert command("verify", tmp_path)[:2] == (2, f"{tmp_path}: no checkpoint in this folder\n")


# Start


def run(*words, **more):
    environment = os.environ | {"COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, env=environment, **more
    )


def test_python_m_is_the_same_command():
    done = run("-m", "hpc_absa", "--version")
    assert (done.returncode, done.stdout) == (0, f"hpc-absa {hpc_absa.__version__}\n")
    done = run("-m", "hpc_absa", "plan", "none.toml")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["status", "D"], 0),
        (["replay", "D"], 0),
        (["plan", JOB, "--json"], 0),
        (["plan", "none.toml"], 2),
        (["train", JOB], 2),
        (["run", JOB, "--dry-run"], 0),
        (["--help"], 0),
    ],
    ids=lambda words: " ".join(map(str, words[:1])) if isinstance(words, list) else "",
)
def test_it_answers_without_heavy_imports(tmp_path, words, status):
    (tmp_path / "D").mkdir()
    (tmp_path / "D" / "job.toml").write_text(JOB.read_text())
    done = run("-X", "importtime", "-m", "hpc_absa", *words, cwd=tmp_path)
    assert done.returncode == status
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & set(HEAVY)


def test_a_reader_that_goes_away_is_no_traceback():
    command = f"{sys.executable} -m hpc_absa plan {JOB} --json | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr


def test_an_empty_run_dir_is_a_variable_that_was_not_set(command):
    status, _, err = command("run", JOB, "--run-dir", "")
    assert status == 2
    assert "it is empty, expected a folder" in err
