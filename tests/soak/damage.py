"""Spoils checkpoints in every way that disks, copies and people do, and looks what is loaded.

`python -m tests.soak.damage FOLDER SEED FIRST LAST` runs the cases of these numbers and prints a
JSON line before and after each, so that whoever started it learns which one crashed or hung it. A
case is a run's three checkpoints, in one file each or with shards beside it, some of them spoiled.
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

from hpc_absa.checkpoint import Content, Group, Store, seal, verification
from hpc_absa.comm import SerialCommunicator
from hpc_absa.errors import HpcAbsaError
from hpc_absa.rundir.paths import checkpoint_files
from hpc_absa.training import resuming
from tests.checkpoint.contents import ATTRIBUTES, assert_same

STEPS = (10, 20, 30)
SHARDS = 4
CHUNK = 1 << 16
"""Bytes under one checksum here: these small files have as many as large ones have otherwise."""


def content(step: int) -> Content:
    """A state with arrays on both sides of every threshold, small beside a real one."""
    draw = np.random.default_rng(step)
    layers = {f"layer{i}.weight": draw.random((130, 130), np.float32) for i in range(6)}
    buffers = {"bn.running_mean": draw.random(16), "bn.num_batches_tracked": np.array(step)}
    momentum = {f"momentum.{name}": draw.random(16900, np.float32) for name in layers}
    return Content(
        {**ATTRIBUTES, "step": step},
        {
            "model": Group({}, {**layers, **buffers}),
            "optimizer": Group({"name": "sgd"}, momentum),
            "schedule": Group({"global_batch": 64, "lr": 0.1, "reference": 7.25}),
            "curvature": Group(
                {"eigenvalue": 7.5}, {"eigenvector": draw.random(50_000, np.float32)}
            ),
            "job": Group({"text": 'name = "digits"\n' * 40}),
        },
    )


def publish(folder: Path, step: int, shards: int) -> None:
    """A checkpoint as a world of `shards` ranks writes it; 0 for a single file."""
    store, path = Store(folder, len(STEPS)), folder / f"step-{step:010d}-phase-001.h5"
    whole = content(step)
    if not shards:
        store.publish(path, whole)
        return
    large = [key for key, array in whole.arrays().items() if array.nbytes >= 1 << 16]
    parts = []
    for number in range(shards):
        mine = large[number::shards]
        groups = {
            name: Group({}, {k: whole.groups[of].arrays[k] for of, k in mine if of == name})
            for name in {of for of, _ in mine}
        }
        share = Content({"step": step}, groups)
        parts.append(store.write_shard(path, f"save{step}", number + 1, shards, share))
    rest = {
        name: Group(of.attributes, {k: a for k, a in of.arrays.items() if (name, k) not in large})
        for name, of in whole.groups.items()
    }
    store.publish(path, Content(whole.attributes, rest), tuple(parts))


def files(folder: Path, step: int) -> list[Path]:
    """All files of a generation, the one that is listed first."""
    found = sorted(folder.glob(f"step-{step:010d}-*"))
    return sorted(found, key=lambda path: (path not in checkpoint_files(folder), path))


# Ways to spoil a file


def _size(path: Path) -> int:
    return path.stat().st_size


def _block(path: Path) -> int:
    """Bytes of the first block: HDF5 begins behind it."""
    return path.read_bytes().index(seal.HDF5)


def _overwrite(path: Path, place: int, found: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(found)


def _flip(path: Path, place: int, draw: random.Random) -> None:
    byte = path.read_bytes()[place]
    _overwrite(path, place, bytes([byte ^ 1 << draw.randrange(8)]))


def _region(path: Path, name: str, draw: random.Random) -> int:
    """A place in one of the regions of a file."""
    block, whole = _block(path), path.read_bytes()
    first, last = {
        "magic": (0, len(seal.MAGIC)),
        "checksums": (len(seal.MAGIC), max(len(whole[:block].rstrip(b"\0")), 32)),
        "rest of the block": (len(whole[:block].rstrip(b"\0")), block),
        "superblock": (block, block + 96),
        "headers": (block + 96, block + 4096),
        "anywhere": (0, len(whole)),
        "end": (len(whole) - 64, len(whole)),
    }.get(name, (0, 0))
    if name == "attributes":
        names = (b"digest", b"step", b"format_version", b"global_batch", b"text", b"sha256")
        found = [place for each in names if (place := whole.find(each, block)) > 0]
        first = draw.choice(found or [block])
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
    """Cut at an edge that means something, beside one, or anywhere."""
    block, size = _block(path), _size(path)
    chunks = range(block, size, CHUNK)
    edges = [1, 8, len(seal.MAGIC), 511, 512, block, block + 8, block + 96, size // 2, *chunks]
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
    """A page that never reached the disk, or several."""
    page = draw.choice((512, 4096, 65536))
    first = draw.randrange(-(-_size(path) // page))
    length = min(page * draw.choice((1, 1, 3)), _size(path) - first * page)
    _overwrite(path, first * page, bytes(length))


def zero_the_end(path: Path, draw: random.Random) -> None:
    """Right in length, zero from some place on: a file system after a power cut."""
    place = draw.randrange(_size(path))
    _overwrite(path, place, bytes(_size(path) - place))


def append(path: Path, draw: random.Random) -> None:
    """Longer than written."""
    with path.open("ab") as file:
        file.write(draw.randbytes(draw.choice((1, 100, 4096))))


def enormous(path: Path, draw: random.Random) -> None:
    """A hole at the end, larger than any memory."""
    os.truncate(path, draw.choice((1 << 36, 1 << 42)))


def empty(path: Path, draw: random.Random) -> None:
    """Nothing in it."""
    os.truncate(path, 0)


def directory(path: Path, draw: random.Random) -> None:
    """A folder in its place."""
    path.unlink()
    path.mkdir()
    if draw.random() < 0.5:
        (path / "inside").write_text("x")


def missing(path: Path, draw: random.Random) -> None:
    """Gone."""
    path.unlink()


def no_file(path: Path, draw: random.Random) -> None:
    """Something that is no file: reading it would wait for ever, or fail."""
    path.unlink()
    kind = draw.choice(("fifo", "socket", "dangling", "loop", "/dev/zero"))
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "socket":
            here = os.getcwd()
            os.chdir(path.parent)  # a socket's path is short
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(path.name)
            os.chdir(here)
        case "dangling":
            path.symlink_to(path.with_name("nowhere"))
        case "loop":
            path.symlink_to(path.name)
        case _:
            path.symlink_to(kind)


def other_format(path: Path, draw: random.Random) -> None:
    """A file of another kind under its name."""
    if draw.random() < 0.5:
        path.write_bytes(b"PK\x03\x04" + draw.randbytes(4000))
        return
    path.unlink()
    with h5py.File(path, "w") as file:
        file["x"] = np.arange(10)


def changed_by_hand(path: Path, draw: random.Random) -> None:
    """Opened in h5py and changed; the checksums made to fit in half of the cases."""
    block = _block(path)
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
    if draw.random() < 0.5:
        seal.seal(path, block)


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
    "changed by hand": changed_by_hand,
}


# Ways to spoil a generation


def swapped(folder: Path, step: int, draw: random.Random) -> None:
    """Two of its files under each other's names."""
    one, other = draw.sample(files(folder, step), 2)
    spare = folder / ".spare"
    one.rename(spare)
    other.rename(one)
    spare.rename(other)


def mixed(folder: Path, step: int, draw: random.Random) -> None:
    """One of its files replaced by the other generations' like it, whole or from the middle on."""
    other = draw.choice([each for each in STEPS if each != step])
    index = draw.randrange(len(files(folder, step)))
    mine, theirs = files(folder, step)[index], files(folder, other)[index]
    found = theirs.read_bytes()
    if draw.random() < 0.5:
        half = len(found) // 2
        found = mine.read_bytes()[:half] + found[half:]
    mine.unlink()
    mine.write_bytes(found)


@dataclass(frozen=True)
class Case:
    """One way to spoil one or more of a run's checkpoints."""

    shards: int
    way: str
    steps: tuple[int, ...]
    """Generations that are spoiled."""


def case_of(draw: random.Random, number: int) -> Case:
    """The ways come in turn; the rest is drawn."""
    shards = SHARDS if draw.random() < 0.6 else 0
    ways = [*FILE_WAYS, "mixed", *(["swapped"] * 2 if shards else [])]
    steps = draw.choice(((30,), (30,), (30,), (20, 30), (20,), STEPS))
    return Case(shards, ways[number % len(ways)], steps)


def spoil(folder: Path, case: Case, draw: random.Random) -> None:
    """Damage the generations in a folder whose files may be linked to from elsewhere."""
    for step in case.steps:
        found = files(folder, step)
        for path in found:  # no damage to the original
            shutil.copyfile(path, folder / ".own")
            (folder / ".own").rename(path)
        if case.way in ("swapped", "mixed"):
            {"swapped": swapped, "mixed": mixed}[case.way](folder, step, draw)
        else:
            FILE_WAYS[case.way](draw.choice(found), draw)


def judge(folder: Path, case: Case) -> str:
    """What is loaded of the folder, or which rule that breaks."""
    pristine = {step: content(step) for step in STEPS}
    path, found, damaged = _load(folder)
    statuses = {each.path: each.error for each in verification.verify(folder)}
    if found is None:
        good = [step for step in STEPS if step not in case.steps]
        if good:
            return f"WRONG: nothing loaded though step {good[-1]} is good: {damaged}"
        return "clear error"
    assert path is not None
    step = int(found.attributes["step"])
    try:
        assert_same(found, pristine.get(step, Content({}, {})))
    except AssertionError:
        return f"WRONG: {path.name} loaded with another content than was written"
    if path in statuses and statuses[path] is not None:
        return f"WRONG: verify says {statuses[path]} of {path.name}, which is loaded"
    newer = [each for each in checkpoint_files(folder) if each.name > path.name]
    unnamed = [each.name for each in newer if each.stem not in damaged]
    if unnamed:
        return f"WRONG: passed over without a word: {unnamed}"
    untouched = max((each for each in STEPS if each not in case.steps), default=0)
    if step < untouched:
        return f"WRONG: step {step} loaded though {untouched} is good"
    return "still good" if f"{step:010d}" in path.name and step in case.steps else "an older one"


def _load(folder: Path) -> tuple[Path | None, Content | None, str]:
    try:
        loaded = resuming.newest_good(Store(folder, len(STEPS)), SerialCommunicator())
    except HpcAbsaError as error:
        return None, None, str(error)
    if loaded is None:
        return None, None, "there is no checkpoint at all"
    return loaded.path, loaded.content, "; ".join(loaded.damaged)


def main(folder: Path, seed: str, first: int, last: int) -> None:
    """Run cases; two lines each."""
    seal.CHUNK = CHUNK
    originals = {}
    for shards in (0, SHARDS):
        originals[shards] = folder / f"original-{shards}"
        originals[shards].mkdir(parents=True)
        for step in STEPS:
            publish(originals[shards], step, shards)
    for number in range(first, last):
        draw = random.Random(f"{seed}-{number}")
        case = case_of(draw, number)
        said = {"number": number, "way": case.way, "shards": case.shards, "steps": case.steps}
        print(json.dumps(said), flush=True)
        place = folder / "case"
        shutil.copytree(originals[case.shards], place, copy_function=os.link)
        spoil(place, case, draw)
        print(json.dumps({**said, "outcome": judge(place, case)}), flush=True)
        shutil.rmtree(place)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
