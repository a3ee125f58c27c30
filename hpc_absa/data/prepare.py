"""From a job's `[data]` table to an open packed data set; what stands behind `hpc-absa data`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpc_absa.data.packed import FORMAT, FORMAT_VERSION, PackedDataset, open_packed, text
from hpc_absa.errors import UsageError


def prepare(
    name: str,
    root: Path | None,
    arguments: Mapping[str, Any],
    packed: Path,
    progress: bool = False,
) -> PackedDataset:
    """Open `packed`, packing it first where it does not exist.

    Args:
        name: Of the source (`sources.SOURCES`, or `"package.module:function"`).
        root: Where the raw data lies; not looked at where `packed` exists.
        arguments: The source's own, from the `[data]` table.
        packed: The packed file.
        progress: Whether to show a progress bar on standard error while packing.

    Raises:
        UsageError: `packed` holds another data set than the job names, or see `sources.load`.
        HpcAbsaError: It is damaged, or cannot be written.
    """
    if not packed.exists():
        return pack(name, root, arguments, packed, progress)
    dataset = open_packed(packed)
    if (dataset.name, dataset.arguments) != (name, dict(arguments)):
        raise UsageError(
            f"{packed}: holds {_title(dataset.name, dataset.arguments)}, but the job asks for "
            f"{_title(name, arguments)}; remove the file or name another one"
        )
    return dataset


def pack(
    name: str,
    root: Path | None,
    arguments: Mapping[str, Any],
    packed: Path,
    progress: bool = False,
) -> PackedDataset:
    """Pack a source, replacing a packed file of ours once the new one is complete; see `prepare`.

    Raises:
        UsageError: `packed` is a file that is no packed data set; nothing is read or written.
    """
    if packed.exists():
        _require_packed(packed)
    # Imported here because workers only read, and reading needs none of it.
    from hpc_absa.data.packing import write_packed
    from hpc_absa.data.sources import load

    source = load(name, root, arguments)
    if not progress:
        return write_packed(packed, source, name, dict(arguments))
    with progress_bar(f"packing {name}") as advance:
        return write_packed(packed, source, name, dict(arguments), advance)


def packed_beside(root: Path) -> Path:
    """Where the packed form of the data set in `root` lies unless a place is named: `ROOT.h5`.

    Raises:
        UsageError: the folder has no name, as `/`.
    """
    root = Path(os.path.abspath(root.expanduser()))
    if not root.name:
        raise UsageError(f"{root}: expected the folder of a data set; or name the packed file")
    return root.with_name(f"{root.name}.h5")


def _require_packed(path: Path) -> None:
    """Refuse to replace a file that is not ours; a damaged one of ours may be replaced."""
    import h5py

    try:
        with h5py.File(path, "r", locking=False) as file:
            ours = text(file.attrs.get("format", b"")) == FORMAT
    except Exception:  # h5py has no one kind of error for what it cannot make sense of
        ours = False
    if not ours:
        raise UsageError(
            f"{path}: exists, and is not a data set packed by hpc-absa; "
            "remove it, or name another file with --out"
        )


def describe(path: Path) -> dict[str, Any]:
    """What a packed file holds, for people and for JSON; errors as `open_packed`."""
    dataset = open_packed(path)
    return {
        "path": str(path),
        "format_version": FORMAT_VERSION,
        "name": dataset.name,
        "arguments": dataset.arguments,
        "train": len(dataset.train),
        "test": len(dataset.test),
        "shape": list(dataset.shape),
        "dtype": str(dataset.train.images.dtype),
        "classes": list(dataset.classes),
        "mean": dataset.mean.tolist(),
        "std": dataset.std.tolist(),
        "digest": dataset.digest,
        "bytes": path.stat().st_size,
    }


@contextmanager
def progress_bar(title: str) -> Iterator[Any]:
    """A bar on standard error with images, rate and time left; yields `advance(done, total)`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn("images"))
    left = TimeLeft(elapsed_when_finished=True)
    with Progress(*columns, left, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _title(name: str, arguments: Mapping[str, Any]) -> str:
    listed = ", ".join(f"{key} = {value}" for key, value in arguments.items())
    return f"{name} ({listed})" if listed else name
