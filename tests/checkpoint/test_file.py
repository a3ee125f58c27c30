"""One checkpoint file: bit for bit or an error, complete or not at all."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest

from hpc_absa import hdf5
from hpc_absa.checkpoint import Content, Group, file, format, integrity
from hpc_absa.checkpoint.file import read, write
from hpc_absa.checkpoint.integrity import CHUNK, NotACheckpointError
from hpc_absa.errors import CheckpointError
from tests.checkpoint.contents import ATTRIBUTES, assert_same, content, mounted, seal

NAN_WITH_PAYLOAD = np.array([0x7FC01234, 0xFFC0FFEE, 0x80000000], np.uint32).view(np.float32)


@pytest.fixture(name="path")
def _path(tmp_path):
    return tmp_path / "x.h5"


@pytest.fixture(name="good")
def _good(path):
    write(path, content())
    return path


# Round trip


@pytest.mark.parametrize(
    "array",
    [
        *(np.array([[0, 1], [2, 3]], kind) for kind in "bBhHiIqQefdFD"),
        np.array([True, False]),
        np.array(3.5),
        np.zeros(0, np.float32),
        np.zeros((0, 3), np.int8),
        NAN_WITH_PAYLOAD,
        np.arange(12.0).reshape(3, 4)[:, ::2],
    ],
    ids=lambda array: f"{array.dtype}{list(array.shape)}",
)
def test_arrays_are_restored_bit_for_bit(path, array):
    expected = Content({}, {"model": Group({}, {"w": array})})
    write(path, expected)
    assert_same(read(path), expected)


@pytest.mark.parametrize(
    "value",
    [
        0,
        -(2**63),
        2**63 - 1,
        0.1,
        -0.0,
        float("inf"),
        float("nan"),
        5e-324,
        True,
        False,
        "",
        "λ ≤ λ_ref/α → 2×",
        "\n",
    ],
    ids=repr,
)
def test_attributes_are_restored_with_their_type(path, value):
    write(path, Content({"root": value}, {"schedule": Group({"group": value})}))
    actual = read(path)
    for each in (actual.attributes["root"], actual.groups["schedule"].attributes["group"]):
        assert type(each) is type(value)
        assert repr(each) == repr(value)


def test_names_of_any_kind_are_restored(path):
    arrays = {name: np.ones(2) for name in ("blocks.0.weight", "a/b", "a/c.d", "Gewicht µ")}
    expected = Content({}, {"model": Group({}, arrays), "empty": Group()})
    write(path, expected)
    assert_same(read(path), expected)


def test_plain_h5py_reads_everything_by_name(good):
    with h5py.File(good) as plain:
        assert plain.attrs["format"] == "hpc-absa"
        assert plain.attrs["step"] == 120
        assert plain["schedule"].attrs["lr"] == 0.1
        assert plain["model/conv.weight"].shape == (4, 3, 3, 3)


def test_bytes_written_are_the_size_of_the_file(path):
    assert write(path, content()).bytes == path.stat().st_size


# Complete or not at all


def assert_unchanged(path, expected):
    assert_same(read(path), expected)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_content_that_cannot_be_written_leaves_the_previous_file(good):
    unwritable = Content({}, {"model": Group({}, {"w": np.array([object()])})})
    with pytest.raises(CheckpointError, match=r"x\.h5: cannot be written: "):
        write(good, unwritable)
    assert_unchanged(good, content())


def change_array(path):
    with h5py.File(path) as opened:
        start = opened["model/conv.weight"].id.get_offset()
    with path.open("r+b") as opened:
        opened.seek(start)
        opened.write(b"?")


def change(action):
    def changed(path):
        with h5py.File(path, "r+") as opened:
            action(opened)

    return changed


@pytest.mark.parametrize(
    "damage",
    [
        change_array,
        change(lambda f: f.attrs.modify("step", 122)),
        change(lambda f: f.attrs.modify("digest", "sha256:" + "0" * 64)),
        change(lambda f: f["schedule"].attrs.modify("lr", 0.2)),
        change(lambda f: f["model"].pop("conv.weight")),
        change(lambda f: f.create_group("shards").attrs.create("a.shard", "sha256:1")),
        lambda path: os.truncate(path, path.stat().st_size - 1),
        lambda path: os.truncate(path, path.stat().st_size + 1),
    ],
    ids=[
        *("array", "root attribute", "digest", "group attribute", "missing array", "shards"),
        *("too short", "too long"),
    ],
)
def test_a_file_that_reads_back_differently_is_not_published(good, monkeypatch, damage):
    compare = file._compare

    def damage_and_compare(temporary, *expected):
        damage(temporary)
        return compare(temporary, *expected)

    monkeypatch.setattr(file, "_compare", damage_and_compare)
    with pytest.raises(CheckpointError, match=r"cannot be written: what was read back is not"):
        write(good, content(step=121))
    assert_unchanged(good, content())


def test_an_interrupt_during_a_write_leaves_the_previous_file(good, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(good, content(step=121))
    assert_unchanged(good, content())


def test_a_write_into_a_missing_folder_names_the_cause(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone/x\.h5: cannot be written: .*No such file"):
        write(tmp_path / "gone" / "x.h5", content())


def test_an_error_of_a_full_disk_names_the_cause_and_frees_the_space(tmp_path):
    large = Content({}, {"model": Group({}, {"w": np.ones(1 << 19)})})
    with mounted(tmp_path / "small", "size=2m") as folder:
        path = folder / "x.h5"
        write(path, content())
        free = os.statvfs(folder).f_bavail
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"x\.h5: .*no space left on the device"):
                write(path, large)
        assert_unchanged(path, content())
        assert os.statvfs(folder).f_bavail == free
        write(path, content(step=121))


FAILING_WRITES = """
import resource, sys
from pathlib import Path
from hpc_absa.checkpoint import write
from hpc_absa.errors import CheckpointError
from tests.checkpoint.contents import content

path = Path(sys.argv[1])
size = write(path, content()).bytes
for limit in range(0, size, size // 20):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write(path, content(step=121))
    except CheckpointError as error:
        print(error)
"""


def test_a_write_that_fails_at_any_byte_does_not_crash_at_exit(path):
    done = subprocess.run(
        [sys.executable, "-c", FAILING_WRITES, path], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    messages = done.stdout.splitlines()
    assert len(messages) >= 20
    assert set(messages) == {f"{path}: cannot be written: File too large"}
    assert_unchanged(path, content())


def test_a_write_into_a_read_only_folder_names_the_cause(tmp_path):
    with mounted(tmp_path / "fixed", "size=2m") as folder:
        path = folder / "x.h5"
        write(path, content())
        assert os.system(f"mount -o remount,ro {folder}") == 0
        with pytest.raises(CheckpointError, match=r"x\.h5: cannot be written: .*Read-only"):
            write(path, content(step=121))
        assert_unchanged(path, content())


def test_a_writer_killed_at_any_moment_leaves_a_good_file(good):
    versions = {step: content(step) for step in range(120, 124)}
    for attempt in range(10):
        child = os.fork()
        if child == 0:
            while True:
                for each in versions.values():
                    write(good, each)
        time.sleep(0.01 + 0.003 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        actual = read(good)
        assert_same(actual, versions[actual.attributes["step"]])


# Changed by another program


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f["model/conv.weight"].write_direct(np.full((4, 3, 3, 3), 0.25, np.float32)),
        lambda f: f.attrs.modify("epoch", 4),
        lambda f: f.attrs.create("epoch", 3.0),
        lambda f: f["schedule"].attrs.modify("lr", 0.2),
        lambda f: f["schedule"].attrs.pop("patience_count"),
        lambda f: f["schedule"].attrs.create("milestones_passed", 1),
        lambda f: f.move("model/conv.weight", "model/renamed.weight"),
        lambda f: f.move("model/conv.weight", "optimizer/conv.weight"),
        lambda f: f.move("curvature", "renamed"),
        lambda f: f.pop("curvature"),
        lambda f: f.create_group("extra"),
        lambda f: f["model"].create_dataset("extra", data=np.zeros(0)),
        lambda f: f.attrs.pop("digest"),
        lambda f: f.attrs.modify("digest", "sha256:" + "0" * 64),
        lambda f: f.attrs.pop("format_version"),
        lambda f: f.attrs.create("format_version", "one"),
        lambda f: f.create_dataset("stray", data=1),
    ],
)
def test_every_change_through_hdf5_is_detected(good, change):
    with h5py.File(good, "r+") as opened:
        change(opened)
    with pytest.raises(CheckpointError, match=r"x\.h5: damaged: "):
        read(good)


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f.attrs.pop("digest"),
        lambda f: f.attrs.pop("format_version"),
        lambda f: f.attrs.create("format_version", "one"),
        lambda f: f.create_dataset("stray", data=1),
        lambda f: f["model"].create_dataset("gzip", data=np.zeros(99), compression="gzip"),
        lambda f: f["model"].create_dataset("chunks", data=np.zeros(99), chunks=(10,)),
    ],
    ids=["no digest", "no version", "version is text", "stray array", "gzip", "chunks"],
)
def test_a_sealed_file_of_another_structure_is_refused(good, change):
    with h5py.File(good, "r+") as opened:
        change(opened)
    seal(good)
    with pytest.raises(CheckpointError, match=r"x\.h5: damaged: "):
        read(good)


@pytest.mark.parametrize(("version", "age"), [(3, "a newer"), (1, "an older")])
def test_another_format_version_is_refused_by_name(good, version, age):
    with h5py.File(good, "r+") as opened:
        opened.attrs["format_version"] = version
    seal(good)
    with pytest.raises(CheckpointError, match=rf"format version {version}, expected 2: .*{age}"):
        read(good)


# Damage


def refused(path):
    """Whether reading raises a `CheckpointError`; if not, the content must be the written one."""
    try:
        actual = read(path)
    except CheckpointError:
        return True
    assert_same(actual, content())
    return False


def test_a_file_truncated_anywhere_is_refused(good):
    data = good.read_bytes()
    edges = {0, 1, 8, 19, 20, 511, 512, 513, 520, 608, 1024, len(data) - 1}
    for length in sorted(edges | set(range(0, len(data), 211))):
        good.write_bytes(data[:length])
        assert refused(good), length


def test_a_file_extended_beyond_memory_is_refused(good):
    os.truncate(good, 1 << 42)
    with pytest.raises(CheckpointError, match=r"damaged: it has 4398046511104 bytes, not the \d+"):
        read(good)


def test_a_file_longer_than_written_is_refused(good):
    good.write_bytes(good.read_bytes() + b"\0")
    assert refused(good)


def test_one_flipped_bit_in_any_byte_is_detected(good):
    data = good.read_bytes()
    random_bits = random.Random(0)
    with good.open("r+b", buffering=0) as opened:
        for position, byte in enumerate(data):
            os.pwrite(opened.fileno(), bytes([byte ^ 1 << random_bits.randrange(8)]), position)
            assert refused(good), position
            os.pwrite(opened.fileno(), bytes([byte]), position)
    assert_same(read(good), content())


@pytest.mark.parametrize("page", [512, 4096])
def test_zeroed_pages_are_detected(good, page):
    data = good.read_bytes()
    detected = 0
    for start in range(0, len(data), page):
        damaged = bytearray(data)
        damaged[start : start + page] = bytes(len(data[start : start + page]))
        good.write_bytes(damaged)
        assert refused(good) == (bytes(damaged) != data)
        detected += bytes(damaged) != data
    assert detected


def test_a_file_made_of_halves_of_two_checkpoints_is_refused(good, tmp_path):
    other = tmp_path / "other.h5"
    write(other, content(step=121, weight=0.75))
    one, two = good.read_bytes(), other.read_bytes()
    half = len(one) // 2
    good.write_bytes(one[:half] + two[half:])
    assert refused(good)


def test_damaged_bytes_never_reach_libhdf5(good, monkeypatch):
    """It loops for ever on some: a bit of a free-list pointer is enough (seen with HDF5 2.0.0)."""

    def reached(*_, **__):
        raise AssertionError("HDF5 opened a damaged file")

    damaged = bytearray(good.read_bytes())
    damaged[2552] ^= 4
    good.write_bytes(damaged)
    monkeypatch.setattr(h5py, "File", reached)
    with pytest.raises(
        CheckpointError, match=r"damaged: bytes 512 to .* do not match their checksum"
    ):
        read(good)


DAMAGED_CHUNKS = """
import sys
from pathlib import Path
from hpc_absa.checkpoint import integrity, read, write
from hpc_absa.errors import CheckpointError
from tests.checkpoint.contents import content, flip_bit

integrity.CHUNK = 512
path = Path(sys.argv[1])
errors = []
for start in range(512, write(path, content()).bytes, 512):
    flip_bit(path, start + 88)
    try:
        read(path)
    except CheckpointError as error:
        errors.append(error)
        print(error)
    flip_bit(path, start + 88)
"""


def test_hdf5_that_is_refused_a_damaged_chunk_does_not_crash_at_exit(path):
    done = subprocess.run(
        [sys.executable, "-c", DAMAGED_CHUNKS, path], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    starts = [line.split("damaged: bytes ")[1].split()[0] for line in done.stdout.splitlines()]
    assert starts == [str(start) for start in range(512, path.stat().st_size, 512)]


def test_a_file_with_headers_between_its_arrays_is_read(path, monkeypatch):
    """As earlier versions wrote it: HDF5 reads chunks that also have arrays' bytes."""
    monkeypatch.setattr(integrity, "CHUNK", 512)
    together = hdf5.reserve_together
    monkeypatch.setattr(hdf5, "reserve_together", lambda all: [hdf5.reserve(*each) for each in all])
    write(path, content())
    scattered = path.read_bytes()
    assert_same(read(path), content())
    monkeypatch.setattr(hdf5, "reserve_together", together)
    write(path, content())
    assert path.read_bytes() != scattered


def test_a_read_error_of_the_file_system_is_named(good, monkeypatch):
    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(CheckpointError, match=r"\.h5: cannot be read: Input/output error"):
        read(good)


def test_what_is_not_a_checkpoint_is_refused_as_such(tmp_path):
    def hdf5(path):
        with h5py.File(path, "w") as opened:
            opened["x"] = 1

    made = {
        "missing.h5": (lambda path: None, "no such file"),
        "folder.h5": (os.mkdir, "not a file"),
        "fifo.h5": (os.mkfifo, "not a file"),
        "foreign.h5": (hdf5, "an HDF5 file, but not a checkpoint"),
        "text.txt": (lambda path: path.write_text("hello"), "not a checkpoint"),
        "empty.txt": (lambda path: path.touch(), "not a checkpoint"),
    }
    for name, (make, message) in made.items():
        make(tmp_path / name)
        with pytest.raises(NotACheckpointError, match=f"{name}: {message}"):
            read(tmp_path / name)


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"hpc-absa", bytes(4096), b"hpc-absa checkpoint\n"]
)
def test_other_bytes_in_a_file_named_h5_are_reported_as_damage(path, data):
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged") as caught:
        read(path)
    assert not isinstance(caught.value, NotACheckpointError)


@pytest.mark.parametrize("name", ["copy.backup", "step-0000000120-phase-007.h5"])
def test_a_copy_under_another_name_is_read(good, tmp_path, name):
    shutil.copy(good, tmp_path / name)
    assert_same(read(tmp_path / name), content())


@pytest.mark.parametrize("attributes", [{**ATTRIBUTES, "step": 12}, {}])
def test_a_file_named_as_another_step_is_refused(tmp_path, attributes):
    path = tmp_path / "step-0000000120-phase-001.h5"
    write(path, Content(attributes, {}))
    with pytest.raises(CheckpointError, match=r"contains step (12|None), not the 120 in its name"):
        read(path)


@pytest.mark.parametrize("where", ["first byte", "last byte", "end of a chunk", "start of a chunk"])
def test_one_byte_that_reads_back_differently_is_detected(path, monkeypatch, where):
    """With arrays that begin and end within one chunk, and that span several."""
    generator = np.random.default_rng(0)
    sizes = {"a": 3, "b": 2 * CHUNK + 5, "c": 1000, "d": CHUNK - 7, "e": 0, "f": 9}
    arrays = {key: generator.integers(0, 256, size, np.uint8) for key, size in sizes.items()}
    expected = Content({}, {"model": Group({}, arrays)})
    write(path, expected)
    assert_same(read(path), expected)
    compare = file._compare

    def damage_and_compare(temporary, *pieces):
        block, places = integrity.block_size(expected.nbytes()), format.outline(temporary).places
        second_chunk = block + CHUNK * (1 + (places["model", "b"].start - block) // CHUNK)
        position = {
            "first byte": places["model", "a"].start,
            "last byte": places["model", "f"].start + 8,
            "end of a chunk": second_chunk - 1,
            "start of a chunk": second_chunk,
        }[where]
        with temporary.open("r+b") as opened:
            byte = os.pread(opened.fileno(), 1, position)
            os.pwrite(opened.fileno(), bytes([byte[0] ^ 1]), position)
        return compare(temporary, *pieces)

    monkeypatch.setattr(file, "_compare", damage_and_compare)
    with pytest.raises(CheckpointError, match="what was read back is not what was written"):
        write(path, expected)
    assert_same(read(path), expected)
