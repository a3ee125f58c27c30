"""What sites and users have in their folders, accounts and terminals."""

import os
import signal
import stat
import subprocess
import sys

import pytest

from hpc_absa.rundir import RunDir
from tests.mpi.jobs import write_job
from tests.supervised import Supervised

pytestmark = pytest.mark.mpi

SHORT = ("--max-ranks", "2", "--set", "train.epochs=2")


def run(folder, *, prefix=(), **options):
    words = [*prefix, sys.executable, "-m", "hpc_absa", "run", "small.toml", "--run-dir", "D"]
    return subprocess.run(
        [*words, *SHORT], cwd=folder, capture_output=True, text=True, timeout=180, **options
    )


def test_modules_in_the_start_folder_do_not_replace_others(tmp_path):
    """Only a module that the job names is imported from there."""
    write_job(tmp_path)
    for name in ("random", "pkgutil", "numpy", "secrets"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} of the start folder')\n")
    (tmp_path / "my_loss.py").write_text("from torch.nn.functional import cross_entropy as loss\n")
    words = [sys.executable, "-P", "-m", "hpc_absa", "run", "small.toml", "--run-dir", "D", *SHORT]
    done = subprocess.run(
        [*words, "--set", "train.loss=my_loss:loss"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_python_m_does_not_import_from_the_start_folder(tmp_path):
    (tmp_path / "random.py").write_text("raise SystemExit('random of the start folder')\n")
    words = [sys.executable, "-m", "hpc_absa", "status", "."]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, "not a run directory" in done.stderr) == (2, True), done.stderr


@pytest.mark.slow
def test_a_group_can_continue_what_one_of_it_began(tmp_path):
    """In a setgid folder with umask 002, all files are writable for the group."""
    write_job(tmp_path)
    tmp_path.chmod(0o2775)
    done = run(tmp_path, prefix=("sh", "-c", 'umask 002; exec "$@"', "sh"))
    assert done.returncode == 0, done.stdout + done.stderr
    entries = list((tmp_path / "D").rglob("*"))
    assert len(entries) > 12
    assert [path for path in entries if not path.stat().st_mode & stat.S_IWGRP] == []
    assert [p for p in entries if p.is_dir() and not p.stat().st_mode & stat.S_ISGID] == []


NO_PASSWD = ("unshare", "-m", "sh", "-c", 'mount --bind /dev/null /etc/passwd; exec "$@"', "sh")


@pytest.mark.parametrize(
    ("home", "prefix"),
    [(None, NO_PASSWD), pytest.param("/proc/nowhere", (), marks=pytest.mark.slow)],
)
def test_a_user_without_a_home(tmp_path, home, prefix):
    write_job(tmp_path)
    if prefix and subprocess.run([*prefix, "true"]).returncode:
        pytest.skip("only root can hide /etc/passwd")
    environment = {key: value for key, value in os.environ.items() if key != "HOME"}
    environment |= {"PIP_USER": "1"} | ({"HOME": home} if home else {})
    done = run(tmp_path, prefix=prefix, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_lost_terminal_saves_and_the_same_command_continues(tmp_path):
    """The shell and the kernel both send SIGHUP: the second one ends nothing."""
    job = write_job(tmp_path)
    process = Supervised(job, RunDir(tmp_path / "run"), "--max-ranks", "1", environment=os.environ)
    process.start().wait_for("epoch", 1)
    for _ in range(3):
        process.process.send_signal(signal.SIGHUP)
    code, output = process.finish()
    assert code == 75, output
    assert process.events("failure") == []
    assert process.events("phase_end")[-1]["outcome"] in ("stopped", "resize")
    assert process.start().finish()[0] == 0


@pytest.mark.slow
def test_nohup_is_respected(tmp_path):
    job = write_job(tmp_path)
    process = Supervised(job, RunDir(tmp_path / "run"), *SHORT, environment=os.environ)
    process.words = ["nohup", *process.words]
    process.start().wait_for("phase_start", 1)
    process.process.send_signal(signal.SIGHUP)
    code, output = process.finish()
    assert code == 0, output


@pytest.mark.slow
def test_settings_that_others_left_are_named_in_a_failure(tmp_path):
    write_job(tmp_path)
    left = {"OMPI_MCA_btl": "nothing", "HOROVOD_CONTROLLER": "mpi"}
    job = tmp_path / "small.toml"
    job.write_text(job.read_text() + "[launch]\nmax_restarts = 0\n")
    done = run(tmp_path, env=os.environ | left)
    assert done.returncode == 1, done.stdout + done.stderr
    named = "(set outside of the job: HOROVOD_CONTROLLER=mpi, OMPI_MCA_btl=nothing)"
    assert named in done.stdout
