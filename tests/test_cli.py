"""The command line: help, exit statuses, one-line errors, JSON output, time to start."""

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

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["hpc-absa", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setenv("NO_COLOR", "1")
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    return command


# Help


def test_the_documented_commands_exist():
    documented = "run launch train plan status list verify compare report data replay cancel"
    assert {*documented.split(), "spectrum", "doctor"} <= COMMANDS.keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_describes_every_argument(command, name):
    status, out, _ = command(name, "--help")
    assert status == 0
    assert COMMANDS[name].help.split("\n")[0].split(":")[0] in out
    parameters = COMMANDS[name].params
    assert parameters
    for parameter in parameters:
        is_option = parameter.param_type_name == "option"
        shown = parameter.opts if is_option else [parameter.metavar or parameter.name]
        assert all(text.lower() in out.lower() for text in shown), parameter.name
        assert parameter.help, parameter.name


def test_help_without_a_command(command):
    status, out, err = command()
    assert status == 2
    assert all(name in out for name in COMMANDS)
    assert err == ""


def test_version(command):
    assert command("--version") == (0, f"hpc-absa {hpc_absa.__version__}\n", "")


# Errors


@pytest.mark.parametrize(
    ("arguments", "line"),
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
        (["plan", JOB, "--scale"], "--scale: the speed of a rank is not known; give --rate N, "),
        (["plan", JOB, "--rate", "0"], "Invalid value for '--rate'"),
        (["plan", JOB, "--machine", "none.toml"], "none.toml: cannot be read as a machine file"),
        (["plan", JOB, "--from", "none"], "none: does not exist; expected a run directory"),
        (["plan", JOB, "--set", "launch.hosts=a:x"], "launch.hosts = 'a:x': expected host"),
        (["train", JOB], "Missing option '--run-dir'"),
        (["run", JOB, "--launcher", "ssh", "--dry-run"], "launch.launcher = 'ssh': expected"),
        (["run", JOB, "--max-ranks", "0"], "Invalid value for '--max-ranks'"),
        (["status"], "Missing argument 'D'"),
        (["quantize", "D", "--bits", "4.5,8"], "--bits '4.5,8': expected whole numbers"),
        (["quantize", "D", "--bits", "4,inf"], "--bits '4,inf': expected whole numbers"),
        (["--bogus"], "No such option: --bogus"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(command, arguments, line):
    status, out, err = command(*arguments)
    assert status == 2
    assert out == ""
    assert line in err
    assert err.startswith("hpc-absa: ")
    assert err.count("\n") == 1


def test_ctrl_c_exits_with_status_75(command, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupt)
    assert command("plan", JOB)[0] == 75


# Commands


def test_plan_prints_one_json_object(command):
    status, out, err = command("plan", JOB, "--json", "--set", "schedule.method=absa")
    assert (status, err) == (0, "")
    plans = json.loads(out)
    assert plans["earliest"]["steps"] < plans["latest"]["steps"]
    for plan in (plans["earliest"], plans["latest"]):
        assert plan["steps"] == sum(phase["steps"] for phase in plan["phases"])
        assert set(plan["phases"][0]) == {
            "epochs", "steps", "global_batch", "ranks", "lr", "estimates", "adversarial"
        }  # fmt: skip


def test_plan_without_measurements_has_its_steps_at_the_top(command):
    settings = ["train.epochs=90", "train.microbatch=128", "train.milestones=[]"]
    settings += ["schedule={method='bl', base_batch=640}"]
    options = [option for setting in settings for option in ("--set", setting)]
    status, out, _ = command("plan", JOB, "--json", "--samples", "50000", *options)
    assert status == 0
    plan = json.loads(out)
    assert plan["steps"] == 7031
    assert [phase["steps"] for phase in plan["phases"]] == [7031]


@pytest.mark.parametrize("key", ["launch.hosts=a:2", "launch.hostfile=HOSTS"])
def test_plan_has_no_more_ranks_than_the_hosts_have_slots(command, tmp_path, key):
    """As `run`; ranks.max is 4."""
    (tmp_path / "hosts").write_text("a slots=2\n")
    settings = ("schedule.method=gg", key.replace("HOSTS", str(tmp_path / "hosts")))
    options = [option for setting in settings for option in ("--set", setting)]
    for more, ranks in (((), 2), (("--max-ranks", "4"), 4)):
        status, out, _ = command("plan", JOB, "--json", *options, *more)
        assert status == 0
        assert max(phase["ranks"] for phase in json.loads(out)["phases"]) == ranks


def test_a_run_has_no_more_ranks_than_the_host_has_gpus(command, tmp_path, monkeypatch):
    words = ("run", JOB, "--run-dir", tmp_path / "run", "--dry-run")
    monkeypatch.setattr("hpc_absa.worldsize.gpus_here", lambda job: 1)
    status, _, err = command(*words)
    assert status == 0
    assert err == "1 GPU here: at most 1 of 4 ranks, which accumulate gradients\n"
    monkeypatch.setattr("hpc_absa.worldsize.gpus_here", lambda job: 4)
    assert command(*words)[::2] == (0, "")


def test_plan_predicts_hours_with_constants_of_a_machine(command, tmp_path):
    """Options go before the file."""
    file = tmp_path / "machine.toml"
    file.write_text("samples_per_second = 1000\nranks_per_node = 2\nparameters = 100\n")
    options = ["--set", "schedule.method=gg", "--machine", file, "--rate", "4000"]
    status, out, err = command("plan", JOB, "--json", *options)
    assert (status, err) == (0, "")
    plan = json.loads(out)
    assert plan["machine"]["samples_per_second"] == 4000
    assert plan["machine"]["ranks_per_node"] == 2
    assert plan["hours"] == pytest.approx(sum(phase["hours"] for phase in plan["phases"]))
    assert plan["node_hours"] == plan["worlds"][-1]["adaptive"]["node_hours"]
    assert [world["ranks"] for world in plan["worlds"]] == [1, 2, 4]
    status, out, _ = command("plan", JOB, *options)
    assert status == 0
    assert "node-hours" in out
    assert f"Constants from {file}: parameters 100, ranks_per_node 2" in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("samples_per_second = 0", "samples_per_second = 0: expected greater than 0"),
        ("latency = 'low'", "latency = 'low': expected a valid number"),
        ("bandwith = 1e9", "bandwith = 1000000000.0: unknown key, expected 'bandwidth'?"),
        ("parameters = 1", "--scale: the speed of a rank is not known"),
        ("parameters = ", "not valid TOML"),
    ],
)
def test_a_wrong_machine_file_is_refused_in_one_line(command, tmp_path, text, message):
    file = tmp_path / "machine.toml"
    file.write_text(text)
    status, out, err = command("plan", JOB, "--machine", file)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_plan_prints_the_steps(command):
    status, out, _ = command("plan", JOB, "--set", "schedule.max_batch=32")
    assert status == 0
    assert "SGD iterations" in out


def test_dry_run_prints_the_command_and_starts_nothing(command, tmp_path):
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


def test_verify_good_checkpoints(command, checkpoints, tmp_path):
    one, two = checkpoints
    assert command("verify", one) == (0, f"{one}: good\n", "")
    assert command("verify", tmp_path) == (0, f"{one}: good\n{two}: good\n", "")
    assert command("verify", one.parent)[0] == 0


def test_verify_names_the_damaged_checkpoint(command, checkpoints, tmp_path):
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


def test_verify_something_else_than_a_checkpoint(command, tmp_path):
    (tmp_path / "text").write_text("hello")
    assert command("verify", tmp_path / "text")[0] == 2
    assert command("verify", tmp_path / "none")[0] == 2
    assert command("verify", tmp_path)[:2] == (2, f"{tmp_path}: no checkpoint in this folder\n")


# In another process


def run(*arguments, **options):
    environment = os.environ | {"COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        **options,
    )


def test_python_m_runs_the_same_command():
    done = run("-m", "hpc_absa", "--version")
    assert (done.returncode, done.stdout) == (0, f"hpc-absa {hpc_absa.__version__}\n")
    done = run("-m", "hpc_absa", "plan", "none.toml")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["status", "D"], 0),
        (["replay", "D"], 0),
        (["plan", JOB, "--json"], 0),
        (["plan", "none.toml"], 2),
        (["train", JOB], 2),
        (["run", JOB, "--dry-run"], 0),
        (["--help"], 0),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_no_heavy_imports(tmp_path, arguments, status):
    (tmp_path / "D").mkdir()
    (tmp_path / "D" / "job.toml").write_text(JOB.read_text())
    done = run("-X", "importtime", "-m", "hpc_absa", *arguments, cwd=tmp_path)
    assert done.returncode == status
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & set(HEAVY)


def test_closed_pipe_gives_no_traceback():
    command = f"{sys.executable} -m hpc_absa plan {JOB} --json | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr


def test_empty_run_dir_is_an_error(command):
    status, _, err = command("run", JOB, "--run-dir", "")
    assert status == 2
    assert "it is empty, expected a folder" in err
