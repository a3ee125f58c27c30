"""Damages checkpoints in every way that disks, copies and users do, and checks what is loaded.

`python -m tests.soak.damage FOLDER SEED FIRST LAST` runs the cases with these numbers and prints a
JSON line before and after each, so that the test that started it can name one that crashed or hung.
A case is a run's three checkpoints, in one file each or with shards, some of them damaged.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from hpc_absa.checkpoint import CheckpointManager, Content, Group, integrity, manager, restore
from hpc_absa.comm import SerialCommunicator
from hpc_absa.errors import HpcAbsaError
from hpc_absa.rundir.paths import checkpoint_files
from tests.checkpoint.contents import ATTRIBUTES, assert_same, seal

STEPS = (10, 20, 30)
SHARDS = 4
CHUNK = 1 << 16
"""Bytes of a chunk here, so that these small files have as many checksums as large ones."""


def content(step: int) -> Content:
    """A small state with arrays on both sides of every threshold."""
    generator = np.random.default_rng(step)
    layers = {f"layer{i}.weight": generator.random((130, 130), np.float32) for i in range(6)}
    buffers = {"bn.running_mean": generator.random(16), "bn.num_batches_tracked": np.array(step)}
    momentum = {f"momentum.{name}": generator.random(16900, np.float32) for name in layers}
    return Content(
        {**ATTRIBUTES, "step": step},
        {
            "model": Group({}, {**layers, **buffers}),
            "optimizer": Group({"name": "sgd"}, momentum),
            "schedule": Group({"global_batch": 64, "lr": 0.1, "reference": 7.25}),
            "curvature": Group(
                {"eigenvalue": 7.5}, {"eigenvector": generator.random(50_000, np.float32)}
            ),
            "job": Group({"text": 'name = "digits"\n' * 40}),
        },
    )


def publish(folder: Path, step: int, shards: int) -> None:
    """A checkpoint as `shards` ranks write it; 0 for a single file."""
    writer, path = CheckpointManager(folder, len(STEPS)), folder / f"step-{step:010d}-phase-001.h5"
    whole = content(step)
    if not shards:
        writer.publish(path, whole)
        return
    large = [key for key, array in whole.arrays().items() if array.nbytes >= 1 << 16]
    written = []
    for number in range(shards):
        mine = large[number::shards]
        groups = {
            name: Group({}, {k: whole.groups[of].arrays[k] for of, k in mine if of == name})
            for name in {of for of, _ in mine}
        }
        share = Content({"step": step}, groups)
        written.append(writer.write_shard(path, f"5a{step}", number + 1, shards, share))
    rest = {
        name: Group(of.attributes, {k: a for k, a in of.arrays.items() if (name, k) not in large})
        for name, of in whole.groups.items()
    }
    writer.publish(path, Content(whole.attributes, rest), tuple(written))


def files(folder: Path, step: int) -> list[Path]:
    """All files of a checkpoint, its own file first."""
    paths = sorted(folder.glob(f"step-{step:010d}-*"))
    return sorted(paths, key=lambda path: (path not in checkpoint_files(folder), path))


# Ways to damage a file


def _size(path: Path) -> int:
    return path.stat().st_size


def _block(path: Path) -> int:
    """Bytes of the first block, after which HDF5 begins."""
    return path.read_bytes().index(integrity.HDF5_MAGIC)


def _overwrite(path: Path, place: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(data)


def _flip(path: Path, place: int, draw: random.Random) -> None:
    byte = path.read_bytes()[place]
    _overwrite(path, place, bytes([byte ^ 1 << draw.randrange(8)]))


def _region(path: Path, name: str, draw: random.Random) -> int:
    """A random offset in a region of a file."""
    block, whole = _block(path), path.read_bytes()
    first, last = {
        "magic": (0, len(integrity.MAGIC)),
        "checksums": (len(integrity.MAGIC), max(len(whole[:block].rstrip(b"\0")), 32)),
        "rest of the block": (len(whole[:block].rstrip(b"\0")), block),
        "superblock": (block, block + 96),
        "headers": (block + 96, block + 4096),
        "anywhere": (0, len(whole)),
        "end": (len(whole) - 64, len(whole)),
    }.get(name, (0, 0))
    if name == "attributes":
        names = (b"digest", b"step", b"format_version", b"global_batch", b"text", b"sha256")
        places = [place for each in names if (place := whole.find(each, block)) > 0]
        first = draw.choice(places or [block])
        last = first + 40
    if name == "data":
        with h5py.File(path, locking=False) as file:
            spans = []
            file.visititems(lambda _, item: spans.append(_span(item)))
        spans = [span for span in spans if span]
        first, last = draw.choice(spans) if spans else (block, len(whole))
    return draw.randrange(first, max(first + 1, min(last, len(whole))))


def _span(item: object) -> tuple[int, int] | None:
    if not isinstance(item, h5py.Dataset) or item.id.get_offset() is None:
        return None
    start = item.id.get_offset()
    return start, start + item.nbytes


REGIONS = (
    "magic",
    "checksums",
    "rest of the block",
    "superblock",
    "headers",
    "attributes",
    "data",
    "end",
    "anywhere",
)


def truncate(path: Path, draw: random.Random) -> None:
    """Cut at a boundary, beside one, or anywhere."""
    block, size = _block(path), _size(path)
    chunks = range(block, size, CHUNK)
    edges = [1, 8, len(integrity.MAGIC), 511, 512, block, block + 8, block + 96, size // 2, *chunks]
    edges += range(4096, size, 4096)[:50]
    place = draw.choice([*edges, draw.randrange(size), size - 1]) + draw.choice((-1, 0, 1))
    os.truncate(path, max(0, min(place, size - 1)))


def flip_a_bit(region: str) -> Callable[[Path, random.Random], None]:
    """One bit in that region."""

    def flip(path: Path, draw: random.Random) -> None:
        _flip(path, _region(path, region, draw), draw)

    return flip


def flip_many_bits(path: Path, draw: random.Random) -> None:
    """Some bits, anywhere."""
    for _ in range(draw.randrange(2, 40)):
        _flip(path, draw.randrange(_size(path)), draw)


def garbage(path: Path, draw: random.Random) -> None:
    """A run of random bytes."""
    place = draw.randrange(_size(path))
    length = min(draw.choice((16, 512, 5000)), _size(path) - place)
    _overwrite(path, place, draw.randbytes(length))


def zero_a_page(path: Path, draw: random.Random) -> None:
    """One or more pages that were never written to disk."""
    page = draw.choice((512, 4096, 65536))
    first = draw.randrange(-(-_size(path) // page))
    length = min(page * draw.choice((1, 1, 3)), _size(path) - first * page)
    _overwrite(path, first * page, bytes(length))


def zero_the_end(path: Path, draw: random.Random) -> None:
    """The right length, but zero from some offset on, as after a power failure."""
    place = draw.randrange(_size(path))
    _overwrite(path, place, bytes(_size(path) - place))


def append(path: Path, draw: random.Random) -> None:
    """Longer than written."""
    with path.open("ab") as file:
        file.write(draw.randbytes(draw.choice((1, 100, 4096))))


def enormous(path: Path, draw: random.Random) -> None:
    """Extended by a hole larger than any memory."""
    os.truncate(path, draw.choice((1 << 36, 1 << 42)))


def empty(path: Path, draw: random.Random) -> None:
    """Without a byte."""
    os.truncate(path, 0)


def directory(path: Path, draw: random.Random) -> None:
    """Replaced by a folder."""
    path.unlink()
    path.mkdir()
    if draw.random() < 0.5:
        (path / "inside").write_text("x")


def missing(path: Path, draw: random.Random) -> None:
    """Removed."""
    path.unlink()


def no_file(path: Path, draw: random.Random) -> None:
    """Replaced by something that is not a file: reading it would block or fail."""
    path.unlink()
    kind = draw.choice(("fifo", "socket", "dangling", "loop", "/dev/zero"))
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "socket":
            here = os.getcwd()
            os.chdir(path.parent)  # a socket's path is short
            with socket.socket(socket.AF_UNIX) as unix_socket:
                unix_socket.bind(path.name)
            os.chdir(here)
        case "dangling":
            path.symlink_to(path.with_name("nowhere"))
        case "loop":
            path.symlink_to(path.name)
        case _:
            path.symlink_to(kind)


def other_format(path: Path, draw: random.Random) -> None:
    """Replaced by a file of another format."""
    if draw.random() < 0.5:
        path.write_bytes(b"PK\x03\x04" + draw.randbytes(4000))
        return
    path.unlink()
    with h5py.File(path, "w") as file:
        file["x"] = np.arange(10)


def changed_with_h5py(path: Path, draw: random.Random) -> None:
    """Opened in h5py and changed."""
    with h5py.File(path, "r+", locking=False) as file:
        arrays: list[h5py.Dataset] = []
        file.visititems(lambda _, item: arrays.append(item) if _is_array(item) else None)
        if arrays and draw.random() < 0.7:
            array = draw.choice(arrays)
            values = array[()]
            values.reshape(-1)[draw.randrange(values.size)] += 1
            array[...] = values
        else:
            file.attrs["step"] = int(file.attrs["step"]) + 1


def another_step(path: Path, draw: random.Random) -> None:
    """Sealed with another step: a checkpoint that is intact, but not the one of its name."""
    with h5py.File(path, "r+", locking=False) as file:
        file.attrs["step"] = int(file.attrs["step"]) + 1
        if "shard" in file.attrs:  # another shard, then
            file.attrs["digest"] = "sha256:" + "0" * 64
    seal(path)


def _is_array(item: object) -> bool:
    return isinstance(item, h5py.Dataset) and item.shape != ()


FILE_WAYS: dict[str, Callable[[Path, random.Random], None]] = {
    "truncated": truncate,
    **{f"bit in {region}": flip_a_bit(region) for region in REGIONS},
    "bits": flip_many_bits,
    "garbage": garbage,
    "zeroed page": zero_a_page,
    "zeroed end": zero_the_end,
    "longer": append,
    "enormous": enormous,
    "empty": empty,
    "directory": directory,
    "missing": missing,
    "no file": no_file,
    "other format": other_format,
    "changed with h5py": changed_with_h5py,
    "another step": another_step,
}


# Ways to damage a checkpoint of several files


def swapped(folder: Path, step: int, draw: random.Random) -> None:
    """Two of its files, each under the name of the other."""
    one, other = draw.sample(files(folder, step), 2)
    temporary = folder / ".temporary"
    one.rename(temporary)
    other.rename(one)
    temporary.rename(other)


def mixed(folder: Path, step: int, draw: random.Random) -> None:
    """One of its files replaced by that of another step, all of it or the second half."""
    other = draw.choice([each for each in STEPS if each != step])
    index = draw.randrange(len(files(folder, step)))
    mine, theirs = files(folder, step)[index], files(folder, other)[index]
    data = theirs.read_bytes()
    if draw.random() < 0.5:
        half = len(data) // 2
        data = mine.read_bytes()[:half] + data[half:]
    mine.unlink()
    mine.write_bytes(data)


@dataclass(frozen=True)
class Case:
    """One way to damage one or more of a run's checkpoints."""

    shards: int
    way: str
    steps: tuple[int, ...]
    """Of the checkpoints that are damaged."""


def case_of(draw: random.Random, number: int) -> Case:
    """Every way in turn; the rest is random."""
    shards = SHARDS if draw.random() < 0.6 else 0
    ways = [*FILE_WAYS, "mixed", *(["swapped"] * 2 if shards else [])]
    steps = draw.choice(((30,), (30,), (30,), (20, 30), (20,), STEPS))
    return Case(shards, ways[number % len(ways)], steps)


def damage(folder: Path, case: Case, draw: random.Random) -> None:
    """Damage the checkpoints in a folder of hard links, without changing the original files."""
    for step in case.steps:
        paths = files(folder, step)
        for path in paths:
            shutil.copyfile(path, folder / ".copy")
            (folder / ".copy").rename(path)
        if case.way in ("swapped", "mixed"):
            {"swapped": swapped, "mixed": mixed}[case.way](folder, step, draw)
        else:
            FILE_WAYS[case.way](draw.choice(paths), draw)


def judge(folder: Path, case: Case) -> str:
    """What is loaded from the folder, or which rule that breaks."""
    originals = {step: content(step) for step in STEPS}
    path, loaded, damaged = _load(folder)
    statuses = {each.path: each.error for each in manager.verify(folder)}
    if loaded is None:
        good = [step for step in STEPS if step not in case.steps]
        if good:
            return f"WRONG: nothing loaded though step {good[-1]} is good: {damaged}"
        return "clear error"
    assert path is not None
    step = int(loaded.attributes["step"])
    try:
        assert_same(loaded, originals.get(step, Content({}, {})))
    except AssertionError:
        return f"WRONG: {path.name} loaded with another content than was written"
    if path in statuses and statuses[path] is not None:
        return f"WRONG: verify reports {statuses[path]} for {path.name}, which is loaded"
    newer = [each for each in checkpoint_files(folder) if each.name > path.name]
    unnamed = [each.name for each in newer if each.stem not in damaged]
    if unnamed:
        return f"WRONG: skipped without a message: {unnamed}"
    untouched = max((each for each in STEPS if each not in case.steps), default=0)
    if step < untouched:
        return f"WRONG: step {step} loaded though {untouched} is good"
    return "still good" if f"{step:010d}" in path.name and step in case.steps else "an older one"


def _load(folder: Path) -> tuple[Path | None, Content | None, str]:
    try:
        restored = restore.newest_good(CheckpointManager(folder, len(STEPS)), SerialCommunicator())
    except HpcAbsaError as error:
        return None, None, str(error)
    if restored is None:
        return None, None, "there is no checkpoint at all"
    return restored.path, restored.content, "; ".join(restored.damaged)


def main(folder: Path, seed: str, first: int, last: int) -> None:
    """Run cases; two lines each."""
    integrity.CHUNK = CHUNK
    originals = {}
    for shards in (0, SHARDS):
        originals[shards] = folder / f"original-{shards}"
        originals[shards].mkdir(parents=True)
        for step in STEPS:
            publish(originals[shards], step, shards)
    for number in range(first, last):
        draw = random.Random(f"{seed}-{number}")
        case = case_of(draw, number)
        line = {"number": number, "way": case.way, "shards": case.shards, "steps": case.steps}
        print(json.dumps(line), flush=True)
        copy = folder / "case"
        shutil.copytree(originals[case.shards], copy, copy_function=os.link)
        damage(copy, case, draw)
        print(json.dumps({**line, "outcome": judge(copy, case)}), flush=True)
        shutil.rmtree(copy)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
