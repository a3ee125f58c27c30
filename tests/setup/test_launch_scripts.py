"""The scripts in `launch/` that start a job file or a script of the user's in one allocation."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LSF = ["--launcher", "mpirun", "--set", "launch.rsh_agent=blaunch"]
COMMAND = ["--max-ranks", "8", "--", "python", "my train.py", "--lr", "1"]
WORDS = "--max-ranks 8 -- python 'my train.py' --lr 1"


@pytest.mark.parametrize(
    ("script", "arguments", "job", "executed"),
    [
        ("slurm", ["a.toml", "--fresh"], "", ["run", "a.toml", "--fresh", "--launcher", "mpirun"]),
        ("slurm", COMMAND, "", ["launch", "--launcher", "mpirun", *COMMAND]),
        ("gridengine", COMMAND, "", ["launch", "--launcher", "mpirun", *COMMAND]),
        ("pbs", [], "a.toml --fresh", ["run", "a.toml", "--fresh", "--launcher", "mpirun"]),
        ("pbs", [], WORDS, ["launch", "--launcher", "mpirun", *COMMAND]),
        ("lsf", [], "a.toml", ["run", "a.toml", *LSF]),
        ("lsf", [], WORDS, ["launch", *LSF, *COMMAND]),
        ("hosts", ["h", "a.toml", "--fresh"], "", ["run", "a.toml", "--fresh", "--hostfile", "h"]),
        ("hosts", ["h", *COMMAND], "", ["launch", "--hostfile", "h", *COMMAND]),
        ("slurm", [], "", None),
        ("pbs", [], "", None),
        ("lsf", [], "", None),
        ("hosts", ["h"], "", None),
    ],
)
def test_a_launch_script_takes_a_job_file_or_a_command(tmp_path, script, arguments, job, executed):
    programs = tmp_path / "venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "activate").write_text(f"PATH={programs}:$PATH\n")
    program = programs / "hpc-absa"
    program.write_text('#!/bin/sh\n[ "$1" = doctor ] && exit\nprintf "%s\\n" "$PWD" "$@"\n')
    program.chmod(0o755)
    settings = {"JOB": job, "VENV": programs.parent, "PBS_O_WORKDIR": tmp_path}
    done = subprocess.run(
        [ROOT / "launch" / f"{script}.sh", *arguments],
        env={**os.environ, **settings, "SLURM_SUBMIT_DIR": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    if executed is None:
        assert done.returncode
        assert f"launch/{script}.sh" in done.stderr or "bsub" in done.stderr
    else:
        assert done.stdout.splitlines() == [str(tmp_path), *executed]
