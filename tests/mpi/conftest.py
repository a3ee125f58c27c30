"""`mpirun(n, program, *args)`: a program of these tests on n real MPI ranks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def find_mpirun() -> Path | None:
    """The mpirun that Horovod was built with: the environment's, otherwise the site's."""
    own = Path(sys.executable).parent / "mpirun"
    if own.exists():
        return own
    installed = shutil.which("mpirun")
    return Path(installed) if installed else None


def mpi_environment(mpirun: Path) -> dict[str, str]:
    """What mpirun needs as root, out of a virtual environment, on fewer cores than ranks."""
    environment = os.environ | {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    if mpirun.parent == Path(sys.prefix) / "bin":
        environment["OPAL_PREFIX"] = os.path.realpath(sys.prefix)
    return environment


@pytest.fixture(scope="session")
def mpirun() -> Run:
    """Run `mpirun(n, script_or_module, *args, timeout=60, check=True, env=None)`.

    A path that ends in .py is run as a script, anything else as a module. With `check`, a run
    that fails fails the test and shows its output.
    """
    program = find_mpirun()
    if program is None:
        pytest.skip("no mpirun beside this Python or on PATH")

    def run(
        n: int,
        script_or_module: str | Path,
        *args: object,
        timeout: float = 60,
        check: bool = True,
        env: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        target = str(script_or_module)
        python = [sys.executable] if target.endswith(".py") else [sys.executable, "-m"]
        command = [str(program), "--oversubscribe", "-np", str(n), *python, target]
        command += [str(argument) for argument in args]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=timeout,
                cwd=ROOT,
                env=mpi_environment(program) | (env or {}),
            )
        except subprocess.TimeoutExpired as expired:
            pytest.fail(f"{command} took over {timeout} s\n{expired.stdout}\n{expired.stderr}")
        if check and done.returncode:
            pytest.fail(f"{command} exited {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    return run
