"""From a job's `[data]` table to an open packed data set; used by `hpc-absa data`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_absa.data.encoded_packing import FORMAT_VERSION, EncodedSource, pack_encoded
from hpc_absa.data.packed import PackedDataset, check_replaceable, open_packed
from hpc_absa.data.packing import PIXELS_VERSION, Progress, write_packed
from hpc_absa.data.sources import Source, load
from hpc_absa.errors import HpcAbsaError, UsageError

if TYPE_CHECKING:
    from hpc_absa.comm import Communicator


def prepare(
    name: str,
    root: Path | None,
    arguments: Mapping[str, Any],
    packed: Path,
    comm: Communicator | None = None,
) -> PackedDataset:
    """Open the file `packed`; if there is none, `pack` the source first.

    Raises:
        UsageError: `packed` holds another data set than the job names, or see `sources.load`.
        HpcAbsaError: It is damaged, or cannot be written.
    """
    if not packed.exists():
        return pack(name, root, arguments, packed, comm=comm)
    dataset = open_packed(packed)
    _check_same(dataset, name, arguments)
    return dataset


def pack(
    name: str,
    root: Path | None,
    arguments: Mapping[str, Any],
    packed: Path,
    progress: bool = False,
    comm: Communicator | None = None,
) -> PackedDataset:
    """Pack a source, replacing its former packed file once the new one is complete.

    Prints what was left out, and with `progress` a progress bar, on standard error. With `comm`,
    this is rank 0 in `checking.on_rank_0`.

    Raises:
        UsageError: `packed` is another file or another data set; nothing is read or written.
    """
    packed = Path(os.path.realpath(packed))  # a symbolic link is kept, its target replaced
    check_replaceable(packed)
    if packed.exists():
        try:
            _check_same(open_packed(packed), name, arguments)
        except UsageError:
            raise
        except HpcAbsaError:  # damaged, and packed again for that
            pass
    source = load(name, root, arguments)
    if not isinstance(source, Source | EncodedSource):
        raise UsageError(
            f"data.name: {name} returned a torch data set, which is read as it is; only a Source "
            "is packed"
        )
    return pack_source(source, name, arguments, packed, progress, comm)


def pack_source(
    source: Source | EncodedSource,
    name: str,
    arguments: Mapping[str, Any],
    packed: Path,
    progress: bool = False,
    comm: Communicator | None = None,
) -> PackedDataset:
    """As `pack`, of a source that is loaded, into a new file."""
    bar = progress_bar(f"packing {name}") if progress else contextlib.nullcontext()
    with bar as advance:
        if isinstance(source, EncodedSource):
            dataset = pack_encoded(packed, source, name, dict(arguments), advance, comm)
        else:
            dataset = write_packed(packed, source, name, dict(arguments), advance)
    with contextlib.suppress(OSError, ValueError):  # a closed standard error
        for reason, count in sorted(dataset.notes.items()):
            print(f"data: {reason}: {count}", file=sys.stderr)
    return dataset


def _check_same(dataset: PackedDataset, name: str, arguments: Mapping[str, Any]) -> None:
    if (dataset.name, dataset.arguments) != (name, dict(arguments)):
        raise UsageError(
            f"{dataset.path}: holds {_title(dataset.name, dataset.arguments)}, expected "
            f"{_title(name, arguments)}; remove the file or name another one"
        )


def packed_beside(root: Path) -> Path:
    """The default packed file of the data set in the folder `root`: `ROOT.h5`."""
    root = Path(os.path.abspath(os.path.expanduser(root)))
    if not root.name:
        raise UsageError(f"{root}: expected the folder of a data set; or name the packed file")
    return root.with_name(f"{root.name}.h5")


def describe(path: Path) -> dict[str, Any]:
    dataset = open_packed(path)
    return {
        "path": str(path),
        "format_version": FORMAT_VERSION if dataset.is_encoded else PIXELS_VERSION,
        "name": dataset.name,
        "arguments": dataset.arguments,
        "train": len(dataset.train),
        "test": len(dataset.test),
        "shape": list(dataset.shape),
        "dtype": str(dataset.train.images.dtype),
        "classes": list(dataset.classes),
        "mean": dataset.mean.tolist(),
        "std": dataset.std.tolist(),
        "notes": dataset.notes,
        "digest": dataset.digest,
        "bytes": path.stat().st_size,
    }


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """A bar on standard error with images, rate and time left; yields `advance(done, total)`."""
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("images"),
        progress.TimeRemainingColumn(elapsed_when_finished=True),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _title(name: str, arguments: Mapping[str, Any]) -> str:
    listed = ", ".join(f"{key} = {value}" for key, value in arguments.items())
    return f"{name} ({listed})" if listed else name
