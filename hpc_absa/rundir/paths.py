"""The names of the files in a run directory, and what is removed from one."""

from __future__ import annotations

import contextlib
import os
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hpc_absa.errors import UsageError
from hpc_absa.rundir.events import EventLog
from hpc_absa.rundir.files import write_atomic

MARK = "# Resolved by hpc-absa; every key with its value. Changing this file changes nothing.\n"
"""First line of a run directory's `job.toml`: the file is ours, and so is the directory."""

LAUNCH_MARK = "# Written by hpc-absa launch: the command of one rank, and how it is launched.\n"
"""First line of `launch.toml`."""

CHECKPOINT_NAME = re.compile(r"step-(?P<step>\d{10})-phase-(?P<phase>\d{3,})\.h5")
"""Name of a checkpoint; other files in the folder are the user's."""

TENSORBOARD_SUFFIX = ".hpc-absa"
"""Of our files in `tensorboard`; a script may write its own there."""

OWN_FILES = {
    "checkpoints": (
        r"step-\d{10}-phase-\d{3,}\.h5",
        r"step-\d{10}-phase-\d{3,}\.[0-9a-f]+\.\d{4}-of-\d{4}\.shard",
        r"\.step-\d{10}-phase-.*\.tmp",
    ),
    "logs": (
        r"phase-\d+-rank-\d+\.log",
        r"world-\d+-[a-z]+\.log",
        r"link-\d+\.log",
        r"failure\.json",
        r"joined",
        r"\.?ranks\.lock(\..*)?",
    ),
    "chain": (r"\d+\.(sh|json)", r"owner", r"cancelled", r"lock", r"\..*\.(tmp|json\.\d+)"),
    "tensorboard": (r"events\.out\.tfevents\..*" + re.escape(TENSORBOARD_SUFFIX),),
    "data": (
        r"{packed}(\.unreadable\.txt)?",
        r"\.{packed}\.([0-9a-f]+\.tmp|partial(\.jsonl)?)",
    ),
    ".": (
        r"report\.(html|png)",
        r"\.(report\.html|report\.png|job\.toml|launch\.toml)\.[0-9a-f]+\.tmp",
        r"stop",
    ),
    "./": (r"(job|launch)\.toml", r"events\.jsonl"),
}
"""Names of the files that we write, by folder, in the order in which they are removed."""


@dataclass(frozen=True)
class RunDir:
    """The files of a run (`docs/run-directory.md`); nothing is read or written until asked for."""

    path: Path

    @property
    def job(self) -> Path:
        """The resolved job file."""
        return self.path / "job.toml"

    @property
    def launch(self) -> Path:
        """What `hpc-absa launch` starts; absent for the run of a job file."""
        return self.path / "launch.toml"

    @property
    def events(self) -> Path:
        """The append-only event log."""
        return self.path / "events.jsonl"

    @cached_property
    def log(self) -> EventLog:
        """Reads and appends events."""
        return EventLog(self.events)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints, newest last by name."""
        return self.path / "checkpoints"

    def checkpoint_files(self) -> list[Path]:
        """The checkpoints, oldest first, good or damaged; files with other names are the user's."""
        return checkpoint_files(self.checkpoints)

    def newest_step(self) -> int | None:
        """Optimizer steps of the newest checkpoint by name; None without any."""
        files = self.checkpoint_files()
        named = CHECKPOINT_NAME.fullmatch(files[-1].name) if files else None
        return int(named["step"]) if named else None

    @property
    def logs(self) -> Path:
        """Folder of the ranks' output."""
        return self.path / "logs"

    @property
    def data(self) -> Path:
        """Folder for the packed data set, where that cannot be written beside the original."""
        return self.path / "data"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard event files."""
        return self.path / "tensorboard"

    @property
    def report(self) -> Path:
        """The self-contained HTML page."""
        return self.path / "report.html"

    @property
    def figure(self) -> Path:
        """The report's figure."""
        return self.path / "report.png"

    @property
    def lock(self) -> Path:
        """Held by the one supervisor, or the ranks without one, that may write here."""
        return self.path / "lock"

    @property
    def ranks_lock(self) -> Path:
        """Held by rank 0: also under one supervisor, only one set of ranks may train here."""
        return self.logs / "ranks.lock"

    @property
    def stop_request(self) -> Path:
        """If it exists, the ranks save and stop: launchers differ in the signals they forward."""
        return self.path / "stop"

    @property
    def failure(self) -> Path:
        """Written by the first rank that fails; read and removed by the supervisor."""
        return self.logs / "failure.json"

    @property
    def joined(self) -> Path:
        """Exists once all ranks are connected."""
        return self.logs / "joined"

    @property
    def chain(self) -> Path:
        """Folder of the chain of batch jobs (launcher `slurm`)."""
        return self.path / "chain"

    def link_script(self, number: int) -> Path:
        """The batch script of the chain's link `number`, from 1."""
        return self.chain / f"{number:04d}.sh"

    def link_record(self, number: int) -> Path:
        """The batch job of link `number`; exists once that is submitted."""
        return self.chain / f"{number:04d}.json"

    def link_log(self, number: int) -> Path:
        """Output of the batch job of link `number`."""
        return self.logs / f"link-{number:04d}.log"

    def checkpoint(self, step: int, phase: int) -> Path:
        """The checkpoint after `step` optimizer steps; names sort by age."""
        return self.checkpoints / f"step-{step:010d}-phase-{phase:03d}.h5"

    def rank_log(self, phase: int, rank: int) -> Path:
        """Output of one rank; `phase` is the one in which it was started."""
        return self.logs / f"phase-{phase:03d}-rank-{rank:04d}.log"

    def write_job(self, text: str) -> None:
        """Write the resolved job file."""
        write_atomic(self.job, MARK + text)

    def write_launch(self, text: str) -> None:
        """Write what `hpc-absa launch` starts."""
        write_atomic(self.launch, LAUNCH_MARK + text)

    @property
    def is_run(self) -> bool:
        """Whether our own files show that the folder is a run directory."""
        return _begins(self.job, MARK) or self.is_script or bool(self.log.read())

    @property
    def is_script(self) -> bool:
        """Whether `hpc-absa launch` started the run; `launch.toml` is ours then."""
        return _begins(self.launch, LAUNCH_MARK)

    def require_own_files(self) -> None:
        """Refuse to change or remove a file that we have not written.

        Raises:
            UsageError: the folder has one, and nothing shows that it is ours; or it is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path}: is a file; expected a folder for the run")
        own = dict.fromkeys((self.job, self.events, self.stop_request), self.is_run)
        own[self.launch] = self.is_script
        if foreign := [path.name for path in own if path.exists() and not own[path]]:
            raise UsageError(
                f"{self.path}: it has a {foreign[0]}, and is not a run directory; "
                "a run would change or remove that file: name another folder with --run-dir"
            )

    def remove_files(self) -> None:
        """Remove the files of the run, and no others; the folder itself and its lock stay.

        The files that show that the folder is a run directory are removed last.

        Raises:
            UsageError: the folder has files, and nothing shows that it is a run directory,
                or its checkpoints are behind a symbolic link.
        """
        if not self.is_run:
            known = {"lock", *OWN_FILES}  # as `create` and a lock leave them
            if any(entry.name not in known for entry in self.path.iterdir()):
                raise UsageError(f"{self.path}: not a run directory; --fresh removes nothing else")
            return
        if self.checkpoints.is_symlink() and self.checkpoint_files():
            raise UsageError(
                f"{self.checkpoints}: a symbolic link, and --fresh removes nothing behind it, from "
                "where the run would continue; remove those checkpoints, or use another --run-dir"
            )
        root = self.path.resolve()
        for folder, names in OWN_FILES.items():
            own = re.compile("|".join(names).replace("{packed}", re.escape(self._packed_name())))
            for entry in _entries(root / folder):
                if own.fullmatch(entry.name) and (entry.name != "launch.toml" or self.is_script):
                    entry.unlink(missing_ok=True)
            if root / folder != root:
                with contextlib.suppress(OSError):  # the user's own files are in it
                    (root / folder).rmdir()

    def _packed_name(self) -> str:
        """Name of the packed data set in `data`."""
        try:
            name = tomllib.loads(self.job.read_text(encoding="utf-8"))["data"]["name"]
        except (OSError, ValueError, KeyError, TypeError):
            return ""
        return packed_name(str(name))

    def create(self) -> RunDir:
        """Create the folders.

        Raises:
            UsageError: as `require_own_files`.
        """
        self.require_own_files()
        for folder in (self.path, self.checkpoints, self.logs):
            os.makedirs(folder, exist_ok=True)
        return self


def _begins(path: Path, mark: str) -> bool:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.readline() == mark
    except OSError:
        return False


def packed_name(data_name: str) -> str:
    """File name of the packed form of `[data] name`."""
    return f"{data_name.replace(':', '.')}.h5"


def checkpoint_files(folder: Path) -> list[Path]:
    """The checkpoints in a folder by their names, oldest first."""
    return sorted(path for path in folder.glob("step-*.h5") if CHECKPOINT_NAME.fullmatch(path.name))


def _entries(folder: Path) -> Iterator[Path]:
    """The files of a folder; none if it is absent or a symbolic link."""
    if folder.is_dir() and not folder.is_symlink():
        yield from [entry for entry in folder.iterdir() if entry.is_file() or entry.is_symlink()]
