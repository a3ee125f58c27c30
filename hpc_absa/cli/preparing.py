"""Commands before a run: its data, and the checks of the installation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from hpc_absa.cli.options import (
    Json,
    Overrides,
    RunFolder,
    folder,
    print_json,
    print_line,
)
from hpc_absa.console import rich_console
from hpc_absa.data.registry import DATASETS
from hpc_absa.errors import ExitStatus, UsageError

if TYPE_CHECKING:
    from hpc_absa.comm import Communicator


def data(
    name: Annotated[
        str | None,
        Argument(help=", ".join(DATASETS)),
    ] = None,
    root: Annotated[
        Path | None, Option(parser=folder, metavar="D", help="Folder of the raw data set.")
    ] = None,
    out: Annotated[Path | None, Option(help="Packed file; default ROOT.h5.")] = None,
    image_size: Annotated[
        int | None,
        Option(min=1, help="Resize images to this side in pixels, if their sizes differ."),
    ] = None,
    encoded: Annotated[
        bool,
        Option("--encoded", help="Pack image files as they are; they are decoded in training."),
    ] = False,
    unreadable: Annotated[
        str | None,
        Option(metavar="stop|skip", help="With --encoded, at an unreadable file; default stop."),
    ] = None,
    show: Annotated[Path | None, Option(help="Only describe this packed file.")] = None,
) -> int:
    """Pack a data set into the one HDF5 file that all ranks read.

    Example: `hpc-absa data cifar10 --root ~/data/cifar10`

    In the job, `data.root` is either the folder or the packed file: the packed file next to a
    folder is used instead of the folder. What was left out of the data set, and why, is printed
    and kept in the file (`notes` of `--show`).

    With `--encoded` the work may be shared by several ranks, on any number of hosts that see the
    folder; rank 0 writes the file, which is the same with any number of them. Packing that was
    stopped is continued by the same command, also with another number of ranks.
    Example: `mpirun -np 4 hpc-absa data imagenet --root DIR --image-size 224 --encoded`
    """
    from hpc_absa.allocation import requested_ranks
    from hpc_absa.data import prepare
    from hpc_absa.data.sources import decoded

    if show:
        print(json.dumps(prepare.describe(show), indent=2))
        return ExitStatus.OK
    if not name:
        raise UsageError("Missing argument 'NAME', or --show FILE.")
    packed = out or (prepare.packed_beside(root) if root else Path(f"{name}.h5"))
    arguments: dict[str, Any] = {"image_size": image_size} if image_size else {}
    arguments |= {"encoded": True} if encoded else {}
    arguments |= {"unreadable": unreadable} if unreadable else {}

    def pack(comm: Communicator | None = None) -> int:
        prepare.pack(name, root, arguments, packed, progress=True, comm=comm)
        keys = "".join(f", {key} = {json.dumps(value)}" for key, value in arguments.items())
        print_line(
            f"packed: {decoded(packed)}; in the job: [data] name = {name!r}, "
            f"root = {str(packed)!r}{keys}"
        )
        return ExitStatus.OK

    _, ranks = requested_ranks() or ("", 1)
    if ranks == 1:
        return pack()
    from hpc_absa.data.checking import on_rank_0
    from hpc_absa.training.load import on_ranks

    return on_ranks(lambda comm: on_rank_0(comm, lambda: pack(comm)) or ExitStatus.OK)


def doctor(
    job: Annotated[
        Path | None, Argument(metavar="JOB", help="Also check what this job file needs.")
    ] = None,
    run_dir: RunFolder = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> int:
    """Check the installation and this machine, and show how to fix what is wrong.

    With a job file, also check what the job needs: hosts, slots, cores, Slurm, and one microbatch
    through its model, loss and data, with the memory that it takes.

    Examples: `hpc-absa doctor` · `hpc-absa doctor jobs/digits.toml`

    With `--json`: `errors` and `warnings`, their numbers, and `findings`, each with `check`,
    `status` (ok, warning or error), `detail` and `fix`. Exit status: 0 no errors, 1 errors;
    warnings do not change it.
    """
    from hpc_absa import config
    from hpc_absa.doctor import run_checks
    from hpc_absa.rundir import RunDir
    from hpc_absa.supervisor.run_state import default_run_dir

    loaded = config.load(job, tuple(overrides or ())) if job else None
    folder = run_dir or (default_run_dir(loaded) if loaded else Path("runs"))
    findings = []
    with rich_console(stderr=True).status("checking") as status:
        for finding in run_checks(RunDir(folder), loaded):
            findings.append(finding)
            status.update(f"checking, after: {finding.check}")
    number = {state: sum(f.status == state for f in findings) for state in ("error", "warning")}
    if as_json:  # `faults` is the former name of `errors`
        errors = number["error"]
        counts = {"errors": errors, "faults": errors, "warnings": number["warning"]}
        print_json({**counts, "findings": [finding.to_dict() for finding in findings]})
        return ExitStatus.FAILED if errors else ExitStatus.OK
    for state, word in (("error", "ERROR"), ("warning", "WARNING"), ("ok", "good")):
        for finding in (f for f in findings if f.status == state):
            print_line(f"{word:7} {finding.check}: {finding.detail}")
            if finding.fix:
                print_line(f"{'':7} fix: {finding.fix}")
    counted = (f"{n or 'no'} {word}{'s' * (n != 1)}" for word, n in number.items())
    print_line(", ".join(counted))
    return ExitStatus.FAILED if number["error"] else ExitStatus.OK
