"""Packing images as they are encoded: resumable, on any number of ranks, naming unreadable files.

While it runs, the data are in `.NAME.partial`, with a journal of finished blocks beside it: the
same command continues where it was stopped, on any number of ranks. Every file is decoded once as
it is packed (`checking.py`), so that a damaged one is found then and not in training. Rank 0
writes; each file's place follows from the sizes, so the packed file does not depend on the ranks.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import h5py
import numpy as np
from numpy.typing import NDArray

from hpc_absa.data.packed import FORMAT, PackedDataset, check_replaceable, open_packed
from hpc_absa.data.packing import LAYOUT, fixed_text, moments_of
from hpc_absa.errors import HpcAbsaError, UsageError, first_line
from hpc_absa.hdf5 import reserve, write_at
from hpc_absa.rundir.files import sync, write_atomic

if TYPE_CHECKING:
    from hpc_absa.comm import Communicator

FORMAT_VERSION = 2
"""Of files with encoded images; those with pixels have version 1."""
JOURNAL_VERSION = 2
BLOCK, BLOCK_BYTES = 256, 2**26
"""Files of one journal line, and their bytes, at most; a rank has two blocks in memory."""
SYNC_BLOCKS = 10
"""Blocks after which the data are made durable, and then the journal says so."""
MEASURED = 5000
"""Training images, chosen at random, whose centre crops give mean and standard deviation."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class EncodedSource:
    """Image files to be packed as they are."""

    train: tuple[Sequence[Path], Sequence[int]]
    """Files and the label of each."""
    test: tuple[Sequence[Path], Sequence[int]]
    classes: Sequence[str]
    image_size: int
    """Side of the crops, pixels."""
    skip_unreadable: bool = False
    """Whether unreadable files are left out and listed; otherwise one of them ends the packing."""
    notes: Counter[str] = field(default_factory=Counter)


class _Part:
    """Training or test files with their places in the packed file, and what is known about them."""

    def __init__(self, name: str, files: Sequence[Path], labels: Sequence[int]) -> None:
        self.name, self.files, self.labels = name, files, np.asarray(labels, np.int64)
        self.lengths = np.fromiter(map(_size, files), np.int64, len(files))
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)[:-1]])
        self.done, self.good = (np.zeros(len(files), bool) for _ in range(2))
        self.sizes = np.zeros((len(files), 2), np.int64)
        self.digests = np.zeros(len(files), "S32")
        self.problems: list[str] = []
        self.notes: Counter[str] = Counter()

    def blocks(self) -> list[range]:
        """The files that are not packed yet."""
        blocks, first, size = [], 0, 0
        left = np.flatnonzero(~self.done).tolist()
        for place, k in enumerate(left):
            size += int(self.lengths[k])
            last = left[place + 1 : place + 2] != [k + 1]
            if last or k + 1 - left[first] == BLOCK or size >= BLOCK_BYTES:
                blocks.append(range(left[first], k + 1))
                first, size = place + 1, 0
        return blocks

    def record(self, first: int, results: Sequence[Sequence[Any]]) -> None:
        """Results of files from `first` on: width, height, digest, remarks, problem."""
        for k, (width, height, digest, remarks, problem) in enumerate(results, first):
            self.done[k], self.good[k] = True, not problem
            self.sizes[k], self.digests[k] = (width, height), digest
            self.notes.update(remarks)
            self.problems += [problem] if problem else []


def _size(file: Path) -> int:
    try:
        return os.stat(file).st_size
    except OSError:  # such as a link to nothing: reading it says why
        return 0


def pack_encoded(
    path: Path,
    source: EncodedSource,
    name: str,
    arguments: dict[str, Any],
    progress: Progress | None = None,
    comm: Communicator | None = None,
) -> PackedDataset:
    """Pack `source` into `path`, which appears complete or not at all; returns it opened.

    A packing of the same files that was stopped is continued. Unreadable files that are left out
    are listed with the reasons in `NAME.unreadable.txt` beside the packed file. With `comm`, this
    is rank 0 in `checking.on_rank_0`, and all ranks read.

    Raises:
        UsageError: an unreadable file, if they are not left out; names it. Or another process is
            packing into `path`, or a file changed meanwhile.
        HpcAbsaError: the disk cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    journal = partial.with_name(partial.name + ".jsonl")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with journal.open("a") as lock:
            _lock(lock, path)
            _pack_all(path, partial, journal, source, name, arguments, progress, comm)
    except OSError as error:
        raise HpcAbsaError(
            f"{path}: cannot be written ({first_line(error)}); the same command continues"
        ) from error
    return open_packed(path)


def _lock(journal: IO[str], path: Path) -> None:
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(
            f"{path}: another process is packing it; wait for it or end it, and start ranks by a "
            "launcher that connects them (`hpc-absa doctor`)"
        ) from error
    except OSError:  # a file system without locks
        pass


def _pack_all(
    path: Path,
    partial: Path,
    journal: Path,
    source: EncodedSource,
    name: str,
    arguments: dict[str, Any],
    progress: Progress | None,
    comm: Communicator | None,
) -> None:
    parts = [_Part("train", *source.train), _Part("test", *source.test)]
    fingerprint = _fingerprint(parts, arguments)
    if not _continue(journal, partial, parts, fingerprint):
        journal.write_text("")  # which described another file
        _lay_out(partial, parts)
        journal.write_text(json.dumps(fingerprint) + "\n")
    _write_blocks(partial, journal, parts, source.skip_unreadable, progress, comm)
    dropped = _finish(partial, parts, source, name, arguments)
    check_replaceable(path)
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)
    _list_unreadable(path, dropped)
    journal.unlink(missing_ok=True)


def _fingerprint(parts: Sequence[_Part], arguments: dict[str, Any]) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode())
    for part in parts:
        digest.update(part.lengths.tobytes() + part.labels.tobytes())
        for file in part.files:
            digest.update(os.fsencode(file) + b"\0")
    return {"version": JOURNAL_VERSION, "files": digest.hexdigest()}


def _continue(
    journal: Path, partial: Path, parts: Sequence[_Part], fingerprint: dict[str, Any]
) -> bool:
    """Take over what an earlier attempt at the same files has finished."""
    try:
        first, *lines = journal.read_bytes().splitlines(keepends=True)
        if json.loads(first) != fingerprint or not _opens(partial):
            return False
    except (OSError, ValueError):
        return False
    if lines and not lines[-1].endswith(b"\n"):  # cut short by a crash or a full disk
        os.truncate(journal, journal.stat().st_size - len(lines.pop()))
    by_name = {part.name: part for part in parts}
    for line in lines:
        entry = json.loads(line)
        by_name[entry["part"]].record(entry["first"], entry["files"])
    return True


def _opens(partial: Path) -> bool:
    """Whether HDF5 takes the file: not after a kill while the index was written into it."""
    try:
        with h5py.File(partial, "r", locking=False):
            return True
    except OSError:
        return False


def _lay_out(partial: Path, parts: Sequence[_Part]) -> None:
    with h5py.File(partial, "w", **LAYOUT) as layout:
        for part in parts:
            shape = (int(part.lengths.sum()),)
            reserve(layout.id, f"{part.name}/encoded", np.dtype(np.uint8), shape)


def _write_blocks(
    partial: Path,
    journal: Path,
    parts: Sequence[_Part],
    skip_unreadable: bool,
    progress: Progress | None,
    comm: Communicator | None,
) -> None:
    from hpc_absa.comm import SerialCommunicator  # these import torch
    from hpc_absa.data.checking import read_all

    total = sum(len(part.files) for part in parts)
    with h5py.File(partial, "r", locking=False) as layout:
        offsets = [int(layout[f"{p.name}/encoded"].id.get_offset() or 0) for p in parts]
    blocks = [
        (part, block, offset)
        for part, offset in zip(parts, offsets, strict=True)
        for block in part.blocks()
    ]
    listed = (
        [(os.fspath(part.files[k]), int(part.lengths[k])) for k in block]
        for part, block, _ in blocks
    )
    descriptor, entries = os.open(partial, os.O_WRONLY), list[str]()

    def commit() -> None:
        written, entries[:] = entries[:], []  # once only: a second fsync hides a lost write
        os.fsync(descriptor)
        with journal.open("a") as lines:
            lines.writelines(written)

    try:
        with closing(read_all(comm or SerialCommunicator(), listed)) as results:
            for (part, block, offset), files in zip(blocks, results, strict=True):
                for k, file in zip(block, files, strict=True):
                    if file.problem and not skip_unreadable:
                        raise UsageError(
                            f"{file.problem}; replace or remove it, or set data.unreadable = "
                            "'skip' to leave such files out and list them"
                        )
                    write_at(descriptor, memoryview(file.data), offset + int(part.starts[k]))
                known = [file[1:] for file in files]
                part.record(block[0], known)
                entry = {"part": part.name, "first": block[0], "files": known}
                entries.append(json.dumps(entry) + "\n")
                if len(entries) == SYNC_BLOCKS:
                    commit()
                if progress:
                    progress(sum(int(p.done.sum()) for p in parts), total)
    finally:
        commit()
        os.close(descriptor)


def _finish(
    partial: Path, parts: Sequence[_Part], source: EncodedSource, name: str, arguments: Any
) -> list[str]:
    """Write index, labels and attributes; returns the problems of the files left out."""
    digest = hashlib.sha256()
    dropped = [problem for part in parts for problem in part.problems]
    with h5py.File(partial, "r+", libver=LAYOUT["libver"], locking=False) as file:
        for part in parts:
            if not part.good.any():
                raise UsageError(f"the {part.name} set has no readable image")
            source.notes.update(part.notes)
            for key in ("starts", "lengths", "sizes", "labels"):
                file.pop(f"{part.name}/{key}", None)  # of an attempt that ended here
                file[f"{part.name}/{key}"] = getattr(part, key)[part.good]
            digest.update(part.labels[part.good].tobytes() + part.digests[part.good].tobytes())
        if dropped:
            source.notes["unreadable images, left out"] = len(dropped)
        digest.update(json.dumps([list(source.classes), source.image_size]).encode())
        file.pop("classes", None)
        file["classes"] = fixed_text(source.classes)
        file.attrs.update(
            format=fixed_text(FORMAT), format_version=FORMAT_VERSION, encoding=fixed_text("files"),
            name=fixed_text(name), arguments=fixed_text(json.dumps(arguments, sort_keys=True)),
            image_size=source.image_size, digest=fixed_text(digest.hexdigest()),
            notes=fixed_text(json.dumps(dict(source.notes))),
            mean=np.zeros(3), std=np.ones(3),
        )  # fmt: skip
    mean, std = _measure(partial)
    with h5py.File(partial, "r+", libver=LAYOUT["libver"], locking=False) as file:
        file.attrs.update(mean=mean, std=std)
    return dropped


def _measure(partial: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation [3] of some training images' centre crops."""
    from hpc_absa.data.order import permutation

    images = open_packed(partial).train.images
    chosen = np.sort(permutation(0, 0, len(images))[:MEASURED])
    return moments_of(images[chosen[k : k + BLOCK]] for k in range(0, len(chosen), BLOCK))


def _list_unreadable(path: Path, problems: Sequence[str]) -> None:
    manifest = path.with_name(f"{path.name}.unreadable.txt")
    if problems:
        write_atomic(manifest, "".join(f"{problem}\n" for problem in problems))
    elif manifest.exists():
        manifest.unlink()
