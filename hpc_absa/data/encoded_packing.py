"""Packing images as they are encoded: resumable, in threads, with a list of unreadable files.

While it runs, the data are in `.NAME.partial`, with a journal of finished blocks beside it: the
same command continues where it was stopped. Every file is decoded once as it is packed, so that a
damaged one is found then and not in training.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np
from numpy.typing import NDArray

from hpc_absa.data.encoded import decode
from hpc_absa.data.packed import FORMAT, PackedDataset, check_replaceable, open_packed
from hpc_absa.data.packing import LAYOUT, fixed_text, moments_of
from hpc_absa.data.sources import decoded
from hpc_absa.errors import HpcAbsaError, UsageError, first_line
from hpc_absa.hdf5 import reserve, write_at
from hpc_absa.rundir.files import sync, write_atomic

FORMAT_VERSION = 2
"""Of files with encoded images; those with pixels have version 1."""
BLOCK = 256
"""Files of one journal line."""
SYNC_BLOCKS = 40
"""Blocks after which the data are made durable."""
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


@dataclass(frozen=True)
class _Read:
    """What is known of a file once it is packed."""

    length: int
    width: int = 0
    height: int = 0
    digest: str = ""
    problem: str = ""


class _Part:
    """Training or test files with their places in the packed file."""

    def __init__(self, name: str, files: Sequence[Path], labels: Sequence[int]) -> None:
        self.name, self.files, self.labels = name, files, np.asarray(labels, np.int64)
        sizes = np.fromiter((os.stat(file).st_size for file in files), np.int64, len(files))
        self.sizes, self.starts = sizes, np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self.read: list[_Read | None] = [None] * len(files)


def pack_encoded(
    path: Path,
    source: EncodedSource,
    name: str,
    arguments: dict[str, Any],
    progress: Progress | None = None,
) -> PackedDataset:
    """Pack `source` into `path`, which appears complete or not at all; returns it opened.

    A packing of the same files that was stopped is continued. Unreadable files that are left out
    are listed with the reasons in `NAME.unreadable.txt` beside the packed file.

    Raises:
        UsageError: an unreadable file, if they are not left out; names it. Or another process is
            packing into `path`.
        HpcAbsaError: the disk cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    journal = partial.with_name(partial.name + ".jsonl")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with journal.open("a") as lock:
            _lock(lock, path)
            _pack_all(path, partial, journal, source, name, arguments, progress)
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
            f"{path}: another process is packing it; start `hpc-absa data` once, without mpirun "
            "or srun: it uses all cores of its host"
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
) -> None:
    parts = [_Part("train", *source.train), _Part("test", *source.test)]
    fingerprint = _fingerprint(parts, arguments)
    if not _continue(journal, partial, parts, fingerprint):
        _lay_out(partial, parts)
        journal.write_text(json.dumps({"files": fingerprint}) + "\n")
    with h5py.File(partial, "r", locking=False) as layout:
        offsets = {part.name: _offset(layout, part) for part in parts}
    _write_blocks(partial, journal, parts, offsets, source.skip_unreadable, progress)
    dropped = _finish(partial, parts, source, name, arguments)
    check_replaceable(path)
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)
    _list_unreadable(path, dropped)
    journal.unlink(missing_ok=True)


def _fingerprint(parts: Sequence[_Part], arguments: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode())
    for part in parts:
        digest.update(part.sizes.tobytes() + part.labels.tobytes())
        for file in part.files:
            digest.update(os.fsencode(file) + b"\0")
    return digest.hexdigest()


def _continue(journal: Path, partial: Path, parts: Sequence[_Part], fingerprint: str) -> bool:
    """Take over what an earlier attempt at the same files has finished."""
    try:
        first, *lines = journal.read_text().splitlines(keepends=True)
        if json.loads(first) != {"files": fingerprint} or not partial.exists():
            return False
    except (OSError, ValueError):
        return False
    by_name = {part.name: part for part in parts}
    for line in lines:
        if not line.endswith("\n"):  # cut short by a crash
            break
        entry = json.loads(line)
        part = by_name[entry["part"]]
        for k, values in enumerate(entry["files"], start=entry["first"]):
            part.read[k] = _Read(*values)
    return True


def _lay_out(partial: Path, parts: Sequence[_Part]) -> None:
    with h5py.File(partial, "w", **LAYOUT) as layout:
        for part in parts:
            shape = (int(part.sizes.sum()),)
            reserve(layout.id, f"{part.name}/encoded", np.dtype(np.uint8), shape)


def _offset(layout: h5py.File, part: _Part) -> int:
    return int(layout[f"{part.name}/encoded"].id.get_offset() or 0)


def _write_blocks(
    partial: Path,
    journal: Path,
    parts: Sequence[_Part],
    offsets: dict[str, int],
    skip_unreadable: bool,
    progress: Progress | None,
) -> None:
    total = sum(len(part.files) for part in parts)
    done = sum(read is not None for part in parts for read in part.read)
    descriptor = os.open(partial, os.O_WRONLY)
    try:
        with (
            journal.open("a") as lines,
            ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
        ):
            for number, (part, block) in enumerate(_blocks(parts)):
                base = offsets[part.name]

                def pack(k: int, part: _Part = part, base: int = base) -> _Read:
                    return _pack(descriptor, part.files[k], base + int(part.starts[k]))

                results = list(pool.map(pack, block))
                for k, read in zip(block, results, strict=True):
                    if read.problem and not skip_unreadable:
                        raise UsageError(
                            f"{read.problem}; replace or remove it, or set data.unreadable = "
                            "'skip' to leave such files out and list them"
                        )
                    part.read[k] = read
                values = [[*vars(read).values()] for read in results]
                entry = {"part": part.name, "first": block[0], "files": values}
                if number % SYNC_BLOCKS == 0:
                    os.fsync(descriptor)  # before the journal says so
                lines.write(json.dumps(entry) + "\n")
                lines.flush()
                done += len(block)
                if progress:
                    progress(done, total)
    finally:
        os.close(descriptor)


def _blocks(parts: Sequence[_Part]) -> Iterator[tuple[_Part, range]]:
    for part in parts:
        for first in range(0, len(part.files), BLOCK):
            block = range(first, min(first + BLOCK, len(part.files)))
            if any(part.read[k] is None for k in block):
                yield part, block


def _pack(descriptor: int, file: Path, offset: int) -> _Read:
    data = file.read_bytes()
    try:
        width, height = decode(data, decoded(file)).size
    except HpcAbsaError as error:
        return _Read(0, problem=first_line(error))
    write_at(descriptor, memoryview(data), offset)
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    return _Read(len(data), width, height, digest)


def _finish(
    partial: Path, parts: Sequence[_Part], source: EncodedSource, name: str, arguments: Any
) -> list[str]:
    """Write index, labels and attributes; returns the problems of the files left out."""
    digest = hashlib.sha256()
    dropped: list[str] = []
    with h5py.File(partial, "r+", libver=LAYOUT["libver"], locking=False) as file:
        for part in parts:
            if part.name in file and "labels" in file[part.name]:  # of an attempt that ended here
                for key in ("starts", "lengths", "sizes", "labels"):
                    file[part.name].pop(key, None)
            reads = [read for read in part.read if read is not None]
            good = np.array([not read.problem for read in reads])
            dropped += [read.problem for read in reads if read.problem]
            if not good.any():
                raise UsageError(f"the {part.name} set has no readable image")
            group = file[part.name]
            kept = [read for read in reads if not read.problem]
            group["starts"] = part.starts[good]
            group["lengths"] = np.array([read.length for read in kept], np.int64)
            group["sizes"] = np.array([(read.width, read.height) for read in kept], np.int64)
            group["labels"] = part.labels[good]
            digest.update(part.labels[good].tobytes())
            for read in kept:
                digest.update(read.digest.encode())
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
