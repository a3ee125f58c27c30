"""What a supervisor launches: the ranks of a job file, or a user's own script."""

from __future__ import annotations

import copy
import os
import shlex
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from hpc_absa import allocation, config, schedules
from hpc_absa.config import Job, Launchable, Script
from hpc_absa.errors import ExitStatus, UsageError
from hpc_absa.rundir import RunDir
from hpc_absa.rundir.lock import CLOCK_TOLERANCE
from hpc_absa.supervisor.launchers import Command
from hpc_absa.supervisor.process import PYTHON, Exit, Failure
from hpc_absa.worldsize import ranks_for

TRACEBACK = "Traceback (most recent call last):"
MOST_LINES = 30
"""Of a traceback that are shown; the log has all."""

SCRIPT = "script"
"""`data.name` in the `job.toml` of a script's run."""


class Program(ABC):
    """The command of one rank, and how many of them are launched by what."""

    def __init__(self, settings: Launchable, allow_changed: tuple[str, ...] = ()) -> None:
        """
        Args:
            settings: a job or a script.
            allow_changed: keys that may differ from those of the run that is continued.
        """
        self.settings, self.allow_changed = settings, allow_changed

    @abstractmethod
    def worker(self, run: RunDir, maximum: int) -> Command:
        """The command of one rank, which may ask for up to `maximum` ranks."""

    @abstractmethod
    def require_same(self, run: RunDir) -> None:
        """
        Raises:
            UsageError: the saved checkpoints are of something that differs in more than
                `allow_changed`.
        """

    def differs(self, run: RunDir) -> bool:
        """Whether the saved checkpoints are of something else, even if that is allowed."""
        strict = copy.copy(self)
        strict.allow_changed = ()
        try:
            strict.require_same(run)
        except UsageError:
            return True
        return False

    @abstractmethod
    def write(self, run: RunDir) -> None:
        """Store what is launched in the run directory; errors as of `require_same`."""

    @abstractmethod
    def initial_ranks(self, limit: int) -> int:
        """The number of ranks of a new run's first phase, at most `limit`."""

    @abstractmethod
    def job(self, run: RunDir) -> Job:
        """The job that the ranks train; of a script's, `job.toml` as its last phase wrote it."""

    def failed(self, ended: Exit, began: bool) -> Failure | None:
        """Why the ranks ended without an end of their phase, where the program knows better.

        Args:
            ended: how the launcher ended.
            began: whether the ranks had connected to each other.
        """
        return None

    def failed_after(self, outcome: str, ended: Exit) -> Failure | None:
        """What went wrong in the ranks after the end of their phase with `outcome`."""
        return None

    def traceback(self, run: RunDir, rank: int | None, since: float) -> list[str]:
        """The lines of an exception in the user's own code, for the console.

        Args:
            run: the run directory.
            rank: that failed, None for any.
            since: Unix seconds of the launch.
        """
        return []


class JobProgram(Program):
    """`hpc-absa train`, the ranks of a job file."""

    settings: Job

    def worker(self, run: RunDir, maximum: int) -> Command:
        words = [*PYTHON, "-m", "hpc_absa", "train", str(run.job.resolve())]
        words += ["--run-dir", str(run.path.resolve())]
        if self.settings.ranks.max != maximum:
            words += ["--set", f"ranks.max={maximum}"]
        for key in self.allow_changed:
            words += ["--allow-changed", key]
        return Command(tuple(words))

    def require_same(self, run: RunDir) -> None:
        if run.job.exists() and run.checkpoint_files():
            saved = config.load(run.job, warn=False)
            config.refuse_changes(saved, self.settings, str(run.job), self.allow_changed)

    def write(self, run: RunDir) -> None:
        self.require_same(run)
        if run.is_script:
            run.launch.unlink()
        run.write_job(config.dump(self.settings))

    def initial_ranks(self, limit: int) -> int:
        batch = schedules.build(self.settings).initial().global_batch
        return ranks_for(self.settings, batch, limit)

    def job(self, run: RunDir) -> Job:
        return self.settings


class ScriptProgram(Program):
    """A user's command, which uses `hpc_absa.Run`."""

    settings: Script

    def worker(self, run: RunDir, maximum: int) -> Command:
        environment = {
            allocation.RUN_DIR: str(run.path.resolve()),
            allocation.MAX_RANKS: str(maximum),
        }
        if self.allow_changed:
            environment[allocation.ALLOW_CHANGED] = ",".join(self.allow_changed)
        if threads := self.settings.train.threads_per_rank:
            environment["OMP_NUM_THREADS"] = str(threads)
        return Command(self.resolve(), environment, self.settings.directory)

    def write(self, run: RunDir) -> None:
        self.require_same(run)
        run.write_launch(config.dump(self.settings))

    def initial_ranks(self, limit: int) -> int:
        return self.settings.ranks.initial

    def job(self, run: RunDir) -> Job:
        job, limits = config.load(run.job, warn=False), self.settings.ranks
        stated = [most for most in (job.ranks.max, limits.max) if most]
        bounds = {
            "initial": max(job.ranks.initial, limits.initial),
            "max": min(stated, default=None),
        }
        return job.model_copy(update={"ranks": job.ranks.model_copy(update=bounds)})

    def failed(self, ended: Exit, began: bool) -> Failure | None:
        command, status = shlex.join(self.settings.command), f"exited with status {ended.code}"
        if ended.code and began:
            return Failure(f"{command}: {status} within its hpc_absa.Run", exit_code=ended.code)
        if ended.code and not (line := ended.last_line()):
            return None  # the launcher itself failed
        if ended.code:
            reason = f"{command}: {status} before its hpc_absa.Run began: {line}"
            return Failure(reason, exit_code=ended.code, early=True)
        if began:
            reason = f"{command}: exited before its hpc_absa.Run was at its end"
            return Failure(reason, exit_code=ExitStatus.FAILED, final=True)
        reason = f"{command}: exited without a hpc_absa.Run, so there is nothing to supervise"
        return Failure(f"{reason}; see docs/launch.md", exit_code=ExitStatus.USAGE, final=True)

    def failed_after(self, outcome: str, ended: Exit) -> Failure | None:
        if ended.code <= 0 or ended.killed_rank():
            return None
        command, status = shlex.join(self.settings.command), f"exited with status {ended.code}"
        reason = f"{command}: {status} after its hpc_absa.Run had ended ({outcome})"
        return Failure(reason, exit_code=ExitStatus.FAILED, final=True)

    def traceback(self, run: RunDir, rank: int | None, since: float) -> list[str]:
        ranks = "*" if rank is None else f"{rank:04d}"
        for log in sorted(run.logs.glob(f"phase-*-rank-{ranks}.log"), reverse=True):
            if log.stat().st_mtime >= since - CLOCK_TOLERANCE:
                _, mark, text = log.read_text(errors="replace").rpartition(TRACEBACK)
                lines = text.strip("\n").splitlines()
                if mark and lines and not lines[-1].startswith(" "):  # not cut off by a kill
                    return [TRACEBACK, *lines[-MOST_LINES:]]
        return []

    def require_same(self, run: RunDir) -> None:
        if not run.checkpoint_files():
            return
        if not run.is_script:
            saved_job = config.load(run.job, warn=False)
            if saved_job.data.name != SCRIPT:
                raise UsageError(
                    f"{run.path}: a run of the job file {saved_job.name!r}, not of a script; use "
                    "another --run-dir, or --fresh to start over"
                )
            return  # by hand, without a supervisor
        saved = read_script(run)
        old, new = shlex.join(saved.command), shlex.join(self.settings.command)
        directories = saved.directory, self.settings.directory
        for key, there, now in (("command", old, new), ("directory", *directories)):
            if there != now and key not in self.allow_changed:
                raise UsageError(
                    f"{run.launch}: another {key}: {there!r} there, {now!r} here; use another "
                    f"--run-dir, --fresh to start over, or --allow-changed {key}"
                )

    def resolve(self) -> tuple[str, ...]:
        """The command with the path of its program; `python` is the one that runs this.

        Raises:
            UsageError: the program or the Python file does not exist, or cannot be executed.
        """
        name, *arguments = self.settings.command
        folder = Path(self.settings.directory)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        found = None if "/" in name else shutil.which(name, path=path)
        program = Path(found or folder / name)
        if not program.is_file():
            where = f"no such file in {folder}" if "/" in name else "no such program on PATH"
            raise UsageError(f"launch: {name}: {where}; expected a command, as in: {EXAMPLE}")
        if not os.access(program, os.X_OK):
            remedy = f"python {name}" if name.endswith(".py") else f"chmod +x {name}"
            raise UsageError(f"launch: {name}: not executable; expected: {remedy}")
        script = next((word for word in arguments if not word.startswith("-")), "")
        is_python = Path(name).name.startswith("python") and script.endswith(".py")
        if is_python and not (folder / script).is_file():
            raise UsageError(f"launch: {script}: no such file in {folder}")
        return (str(program), *arguments)


EXAMPLE = "hpc-absa launch --max-ranks 4 -- python train.py"


def make_script(
    command: Sequence[str], run_dir: Path | None, settings: Path | None, overrides: tuple[str, ...]
) -> Script:
    """What `hpc-absa launch` is to start.

    Args:
        command: a program and its arguments; without any, what `run_dir` has stored.
        run_dir: the run directory, None for the default one.
        settings: a file with tables of `Script`.
        overrides: as after `--set`.

    Raises:
        UsageError: no command, or settings that are not valid.
    """
    stored = RunDir(run_dir) if run_dir and not command else None
    if stored and stored.is_script:
        tables = config.read(stored.launch)
    elif command:
        tables = {"name": name_of(command)}
    else:
        raise UsageError(f"launch: no command; expected one after --, as in: {EXAMPLE}")
    if settings:
        tables |= config.read(settings, "a file of settings")
    if command:
        tables |= {"command": list(command), "directory": os.getcwd()}
    return config.validate(Script, tables, str(settings or "launch"), overrides)


def name_of(command: Sequence[str]) -> str:
    """A name for the run of a command: that of its script or module, without folders."""
    script, is_module = _script(command)
    return script.rpartition(".")[2] if is_module else Path(script).stem


def _script(command: Sequence[str]) -> tuple[str, bool]:
    """The word that names what a command executes, and whether it is a Python module."""
    for before, word in pairwise(("", *command)):
        if before == "-m" or word.endswith((".py", ".sh")):
            return word, before == "-m"
    return command[0], False


def read_script(run: RunDir) -> Script:
    """What `hpc-absa launch` stored in a run directory."""
    return config.validate(Script, config.read(run.launch), str(run.launch), warn=False)


def read_program(run: RunDir, allow_changed: tuple[str, ...] = ()) -> Program:
    """What a run directory's supervisor launches."""
    if run.is_script:
        return ScriptProgram(read_script(run), allow_changed)
    return JobProgram(config.load(run.job, warn=False), allow_changed)
