"""launch/bootstrap.sh with stand-ins for the tools it finds; nothing is downloaded or compiled."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_absa.doctor.probe import LIBMPI

ROOT = Path(__file__).parents[2]
BOOTSTRAP = ROOT / "launch/bootstrap.sh"
# fmt: off
COREUTILS = [
    "bash", "cat", "chmod", "cut", "date", "dirname", "env", "flock", "head", "ls", "mkdir",
    "mktemp", "mv", "realpath", "rm", "sha256sum", "sleep", "stat", "timeout",
]
# fmt: on


@pytest.fixture
def bin_dir(tmp_path):
    """A PATH of its own, on which no MPI is, whatever this machine has."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in COREUTILS:
        (folder / tool).symlink_to(shutil.which(tool))
    return folder


def script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def clean_environment(**variables: object) -> dict[str, str]:
    names = ("PYTHON", "VENV", "HPC_ABSA", "HOROVOD", "VIRTUAL_ENV", "CONDA_PREFIX", "CXX")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(names)}
    return kept | {k: str(v) for k, v in variables.items()}


def bootstrap(*args: str, **variables: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BOOTSTRAP, *args], env=clean_environment(**variables), capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip


def shell(code: str, **variables: object) -> subprocess.CompletedProcess[str]:
    """Run code after sourcing the script's functions, with its working folder set up."""
    code = f"source {BOOTSTRAP}; WORK=$(mktemp -d); trap clean_up EXIT; LOG=$WORK/log; {code}"
    return subprocess.run(
        [shutil.which("bash"), "-c", code], env=clean_environment(**variables),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def only_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a failed set-up ends with."""
    assert done.returncode == 1, done
    [line] = done.stderr.splitlines()
    return line


# ---- failures say in one line what to do --------------------------------------------------------


def test_an_old_python_is_refused(tmp_path):
    code = "import sys; sys.version_info = (3, 9, 18); exec(sys.stdin.read())"
    old = script(tmp_path / "python3.9", f"exec {sys.executable} -c '{code}'")
    line = only_line(bootstrap(PYTHON=old, VENV=tmp_path / "venv"))
    assert f"{old} is Python 3.9, older than 3.11" in line
    assert "set PYTHON=" in line
    assert not (tmp_path / "venv").exists()


def test_a_python_that_is_not_there_is_named(tmp_path):
    line = only_line(bootstrap(PYTHON="/nowhere/python3", VENV=tmp_path / "venv"))
    assert "/nowhere/python3 not found" in line


def test_a_missing_compiler_is_named(tmp_path):
    line = only_line(bootstrap(PYTHON=sys.executable, CXX="/bin/false", VENV=tmp_path / "venv"))
    assert "no C++17 compiler: install g++" in line


def test_a_changed_horovod_source_is_refused(tmp_path):
    sdist = tmp_path / "horovod-0.28.1.tar.gz"
    sdist.write_bytes(b"something else")
    line = only_line(
        bootstrap(PYTHON=sys.executable, HPC_ABSA_HOROVOD_SDIST=sdist, VENV=tmp_path / "venv")
    )
    assert f"{sdist} is not Horovod 0.28.1 as published" in line


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv/thesis.tex").write_text("years of work")
    line = only_line(
        bootstrap(PYTHON=sys.executable, HPC_ABSA_MPI="package", VENV=tmp_path / "venv")
    )
    assert "is no virtual environment" in line
    assert (tmp_path / "venv/thesis.tex").read_text() == "years of work"


def test_a_failed_command_points_to_the_log(tmp_path):
    done = shell('step "a step"; run sh -c "echo why >&2; exit 3" || fail "do this"')
    assert only_line(done).startswith("bootstrap: a step: do this; details: /")
    assert done.stdout == "[1/8] a step ... failed\n"


def test_an_unknown_option_is_wrong_usage():
    assert bootstrap("--frobnicate").returncode == 2


def test_into_current_needs_an_environment():
    assert "needs an active virtual or conda environment" in only_line(bootstrap("--into-current"))


# ---- users' folders and settings ----------------------------------------------------------------


@pytest.mark.parametrize("home", ["", "/proc/nowhere"])
def test_without_a_home_that_can_be_written_wheels_are_kept_beside_the_environment(home):
    code = f"PREFIX=/x/.venv; {'' if home else 'unset HOME;'} cache_folder"
    done = shell(code, HOME=home, XDG_CACHE_HOME="")
    assert (done.stdout, done.stderr) == ("/x/.venv-cache", "")


def test_a_cache_that_is_named_is_used():
    assert shell("cache_folder", HPC_ABSA_CACHE="/x/y z").stdout == "/x/y z"


def test_pip_installs_into_the_environment_whatever_the_user_has_set(tmp_path):
    """The environment's Python writes pip's settings to a file, and fails."""
    venv = fake_environment(tmp_path / "v")
    shows = f"env | grep ^PIP_ >{tmp_path}/shown; exit 1"
    choose = f'case $1 in -|-c) exec {sys.executable} "$@";; esac'
    script(venv / "bin/python", f"{choose}; {shows}")
    pip = {"PIP_USER": 1, "PIP_TARGET": "/x"}
    done = bootstrap("--into-current", VIRTUAL_ENV=venv, HPC_ABSA_MPI="package", **pip)
    assert done.returncode == 1
    log = (tmp_path / "shown").read_text()
    assert "PIP_USER=0" in log
    assert "PIP_TARGET" not in log


def test_compilers_of_a_folder_with_a_space_print_paths_without_one(tmp_path):
    prefix = tmp_path / "a é b"
    (prefix / "bin").mkdir(parents=True)
    script(prefix / "bin/mpicxx", f'echo "-I{prefix}/include $1"')
    code = f"PREFIX='{prefix}'; PATH=$(mpi_without_spaces):$PATH; mpicxx -showme"
    done = shell(code, TMPDIR="/tmp")
    assert re.fullmatch(r"-I\S+/mpi/prefix/include -showme\n", done.stdout), done


@pytest.mark.parametrize("folder", ["a b", "é", "plain"])
def test_the_loaded_mpi_is_known_in_any_folder(monkeypatch, folder):
    maps = f"7f00-7f01 r-xp 00000000 fe:01 131 {'':20} /x/{folder}/lib/libmpi.so.40\n".encode()
    monkeypatch.setattr(Path, "read_bytes", lambda path: maps + b"7f02 r-xp 0 fe:01 7 /\xff.so\n")
    spec = importlib.util.spec_from_file_location("selfcheck", ROOT / "launch/selfcheck.py")
    selfcheck = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(selfcheck)
    assert selfcheck.loaded_libmpi() == [f"/x/{folder}/lib/libmpi.so.40"]
    assert LIBMPI.findall(os.fsdecode(maps)) == [f"/x/{folder}/lib/libmpi.so.40"]


# ---- which MPI ----------------------------------------------------------------------------------

CHOOSE = 'PREFIX=/venv; choose_mpi; echo "$MPI_ROUTE $MPIRUN | $MPI_NOTE"'
COMPILES = 'for last; do :; done; echo > "$last"'
RUNS = 'case $1 in --version) echo "mpirun (Open MPI) 4.1.4";; *) echo ranks=2;; esac'


def test_without_an_mpi_the_package_is_taken(bin_dir):
    done = shell(CHOOSE, PATH=bin_dir)
    assert done.stdout == ("package /venv/bin/mpirun | from the package index: no mpicc on PATH\n")


def test_a_working_site_mpi_is_taken(bin_dir):
    script(bin_dir / "mpicc", COMPILES)
    script(bin_dir / "mpirun", RUNS)
    done = shell(CHOOSE, PATH=bin_dir)
    assert done.stdout == f"site {bin_dir}/mpirun | {bin_dir}/mpicc\n"


@pytest.mark.parametrize(
    ("mpicc", "mpirun", "reason"),
    [
        (COMPILES, None, "mpicc but no mpirun on PATH"),
        ("exit 1", RUNS, "does not compile a small MPI program"),
        (COMPILES, "exit 1", "does not run a small MPI program on 2 ranks"),
        (COMPILES, "echo ranks=1; echo ranks=1", "does not run a small MPI program on 2 ranks"),
    ],
)
def test_a_broken_site_mpi_is_passed_over_with_a_reason(bin_dir, mpicc, mpirun, reason):
    script(bin_dir / "mpicc", mpicc)
    if mpirun:
        script(bin_dir / "mpirun", mpirun)
    done = shell(CHOOSE, PATH=bin_dir)
    assert done.stdout.startswith("package ")
    assert reason in done.stdout
    forced = shell(CHOOSE, PATH=bin_dir, HPC_ABSA_MPI="site")
    assert reason in only_line(forced)


def test_the_package_can_be_asked_for(bin_dir):
    script(bin_dir / "mpicc", COMPILES)
    script(bin_dir / "mpirun", RUNS)
    assert shell(CHOOSE, PATH=bin_dir, HPC_ABSA_MPI="package").stdout.startswith("package ")
    assert "expected site, package" in only_line(shell(CHOOSE, PATH=bin_dir, HPC_ABSA_MPI="mine"))


def test_an_mpi_inside_a_virtual_environment_is_no_site_mpi(bin_dir, tmp_path):
    other = tmp_path / "other-venv/bin"
    other.mkdir(parents=True)
    (other.parent / "pyvenv.cfg").touch()
    done = shell("path_outside_venvs", PATH=f"{other}:{bin_dir}")
    assert done.stdout == str(bin_dir)


# ---- what is kept, and what is made again -------------------------------------------------------


def fake_environment(folder: Path) -> Path:
    (folder / "bin").mkdir(parents=True)
    (folder / "pyvenv.cfg").touch()
    script(folder / "bin/python", "exit 0")
    return folder


def test_a_finished_environment_is_not_touched(tmp_path):
    venv = fake_environment(tmp_path / "venv")
    stamp = shell("REQUESTED_PYTHON=; stamp", HPC_ABSA_MPI="package")
    (venv / ".hpc-absa-stamp").write_text(stamp.stdout)
    done = bootstrap(VENV=venv, HPC_ABSA_MPI="package")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_another_mpi_makes_the_stamp_stale(bin_dir):
    stamps = [shell("stamp", PATH=bin_dir).stdout]
    script(bin_dir / "mpicc", COMPILES)
    stamps.append(shell("stamp", PATH=bin_dir).stdout)
    stamps.append(shell("stamp", PATH=bin_dir, HPC_ABSA_MPI="package").stdout)
    assert len(set(stamps)) == 3


@pytest.mark.parametrize(
    ("made_for", "interrupted", "kept"),
    [("{python} mpi-1", False, True), ("{python} mpi-1", True, False), ("other", False, False)],
)
def test_a_half_made_or_other_environment_is_remade(tmp_path, made_for, interrupted, kept):
    venv = fake_environment(tmp_path / "venv")
    python = script(tmp_path / "python", 'mkdir -p "$3/bin" && touch "$3/pyvenv.cfg"')
    (venv / ".hpc-absa-made-for").write_text(made_for.format(python=python) + "\n")
    (venv / "old").touch()
    if interrupted:
        (venv / ".hpc-absa-installing").touch()
    done = shell(f"PREFIX={venv} PYTHON={python} MPI_KEY=mpi-1; make_environment")
    assert done.returncode == 0, done.stderr
    assert (venv / "old").exists() == kept


MAKE_WHEEL = 'maker() { echo made >>"$CACHE/count"; sleep 0.3; echo whole >"$1/a-1-py3.whl"; }; '


def test_two_set_ups_at_once_compile_once(tmp_path):
    both = 'get() { (cached_wheel key maker; cat "$WHEEL") ; }; get & get & wait'
    done = shell(MAKE_WHEEL + both, CACHE=tmp_path / "cache")
    assert done.stdout == "whole\nwhole\n"
    assert (tmp_path / "cache/count").read_text() == "made\n"
    assert not list((tmp_path / "cache").glob(".making*"))


def test_a_failed_compilation_is_not_cached(tmp_path):
    failing = 'maker() { echo half >"$1/a-1-py3.whl"; fail "no"; }; cached_wheel key maker'
    assert only_line(shell(failing, CACHE=tmp_path / "cache")).endswith("/log")
    assert not list((tmp_path / "cache").rglob("*.whl"))
    again = shell(MAKE_WHEEL + 'cached_wheel key maker; cat "$WHEEL"', CACHE=tmp_path / "cache")
    assert again.stdout == "whole\n"
