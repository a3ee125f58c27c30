"""One checkpoint file: bit for bit or an error, whole or not at all."""

import os
import random
import shutil
import signal
import time

import h5py
import numpy as np
import pytest

from hpc_absa.checkpoint import Content, Group, file, layout, seal
from hpc_absa.checkpoint.file import NotACheckpointError, read, write
from hpc_absa.errors import CheckpointError
from tests.checkpoint.contents import assert_same, content, mounted

NAN_WITH_PAYLOAD = np.array([0x7FC01234, 0xFFC0FFEE, 0x80000000], np.uint32).view(np.float32)


@pytest.fixture(name="path")
def _path(tmp_path):
    return tmp_path / "step-0000000120-phase-001.h5"


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
def test_arrays_come_back_bit_for_bit(path, array):
    wanted = Content({}, {"model": Group({}, {"w": array})})
    write(path, wanted)
    assert_same(read(path), wanted)


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
def test_attributes_come_back_with_their_type(path, value):
    wanted = Content({"here": value}, {"schedule": Group({"there": value})})
    write(path, wanted)
    found = read(path)
    for back in (found.attributes["here"], found.groups["schedule"].attributes["there"]):
        assert type(back) is type(value)
        assert repr(back) == repr(value)


def test_names_of_any_kind_come_back(path):
    arrays = {name: np.ones(2) for name in ("blocks.0.weight", "a/b", "a/c.d", "Gewicht µ")}
    wanted = Content({}, {"model": Group({}, arrays), "empty": Group()})
    write(path, wanted)
    assert_same(read(path), wanted)


def test_h5py_alone_finds_everything_by_name(good):
    with h5py.File(good) as plain:
        assert plain.attrs["format"] == "hpc-absa"
        assert plain.attrs["step"] == 120
        assert plain["schedule"].attrs["lr"] == 0.1
        assert plain["model/conv.weight"].shape == (4, 3, 3, 3)


def test_bytes_written_are_the_file_s(path):
    assert write(path, content()).bytes == path.stat().st_size


# Whole or not at all


def assert_untouched(path, wanted):
    assert_same(read(path), wanted)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_what_cannot_be_written_leaves_the_former_file(good):
    unwritable = Content({}, {"model": Group({}, {"w": np.array([object()])})})
    with pytest.raises(CheckpointError, match=r"step-.*\.h5: cannot be written: "):
        write(good, unwritable)
    assert_untouched(good, content())


def test_what_reads_back_otherwise_is_not_published(good, monkeypatch):
    fill = file._fill

    def forgetful(temporary, of, places):
        fill(temporary, of, places)
        with temporary.open("r+b") as opened:
            opened.seek(places["model", "conv.weight"].start)
            opened.write(b"?")

    monkeypatch.setattr(file, "_fill", forgetful)
    with pytest.raises(CheckpointError, match=r"cannot be written: what was read back is not"):
        write(good, content(step=121))
    assert_untouched(good, content())


def test_ctrl_c_in_the_middle_leaves_the_former_file(good, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(file.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(good, content(step=121))
    assert_untouched(good, content())


def test_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone/x\.h5: cannot be written: .*No such file"):
        write(tmp_path / "gone" / "x.h5", content())


def test_full_disk_names_the_cause_and_gives_the_space_back(tmp_path):
    large = Content({}, {"model": Group({}, {"w": np.ones(1 << 19)})})
    with mounted(tmp_path / "small", "size=2m") as folder:
        path = folder / "x.h5"
        write(path, content())
        free = os.statvfs(folder).f_bavail
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"x\.h5: .*no space left on the device"):
                write(path, large)
        assert_untouched(path, content())
        assert os.statvfs(folder).f_bavail == free
        write(path, content(step=121))


def test_read_only_folder_names_the_cause(tmp_path):
    with mounted(tmp_path / "fixed", "size=2m") as folder:
        path = folder / "x.h5"
        write(path, content())
        assert os.system(f"mount -o remount,ro {folder}") == 0
        with pytest.raises(CheckpointError, match=r"x\.h5: cannot be written: .*Read-only"):
            write(path, content(step=121))
        assert_untouched(path, content())


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
        found = read(good)
        assert_same(found, versions[found.attributes["step"]])


# Digest


def test_the_layout_in_hdf5_does_not_matter(good, tmp_path):
    repacked = tmp_path / "repacked.h5"
    with (
        h5py.File(good) as old,
        h5py.File(repacked, "w", userblock_size=512, libver="latest") as new,
    ):
        new.attrs.update(dict(reversed(list(old.attrs.items()))))
        for name in reversed(list(old)):
            new.create_group(name, track_order=True).attrs.update(old[name].attrs)
            for key, array in old[name].items():
                extra = {"compression": "gzip", "chunks": True} if array.ndim else {}
                new[name].create_dataset(key, data=array[()], **extra)
    seal.seal(repacked, 512)
    assert_same(read(repacked), content())


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f["model/conv.weight"].write_direct(np.full((4, 3, 3, 3), 0.25, np.float32)),
        lambda f: f.attrs.modify("epoch", 4),
        lambda f: f.attrs.create("epoch", 3.0),
        lambda f: f["schedule"].attrs.modify("lr", 0.2),
        lambda f: f["schedule"].attrs.pop("waited"),
        lambda f: f["schedule"].attrs.create("milestones_passed", 1),
        lambda f: f.move("model/conv.weight", "model/conf.weight"),
        lambda f: f.move("model/conv.weight", "optimizer/conv.weight"),
        lambda f: f.move("curvature", "curvatura"),
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
def test_a_change_that_hdf5_itself_makes_is_noticed(good, change):
    with h5py.File(good, "r+") as opened:
        change(opened)
    seal.seal(good, 512)
    with pytest.raises(CheckpointError, match=r"step-.*\.h5: damaged: "):
        read(good)


@pytest.mark.parametrize(("version", "age"), [(3, "a newer"), (1, "an older")])
def test_another_format_is_refused_as_such(good, version, age):
    with h5py.File(good, "r+") as opened:
        opened.attrs["format_version"] = version
    seal.seal(good, 512)
    with pytest.raises(CheckpointError, match=rf"format version {version}, expected 2: .*{age}"):
        read(good)


# Damage


def assert_never_wrong(path):
    """The content is the written one, or there is an error of ours; returns whether it is one."""
    try:
        found = read(path)
    except CheckpointError:
        return True
    assert_same(found, content())
    return False


def test_truncated_anywhere(good):
    whole = good.read_bytes()
    edges = {0, 1, 8, 19, 20, 511, 512, 513, 520, 608, 1024, len(whole) - 1}
    for length in sorted(edges | set(range(0, len(whole), 211))):
        good.write_bytes(whole[:length])
        assert assert_never_wrong(good), length


def test_a_hole_larger_than_memory_behind_the_end(good):
    os.truncate(good, 1 << 42)
    with pytest.raises(CheckpointError, match=r"damaged: it has 4398046511104 bytes, not the \d+"):
        read(good)


def test_longer_than_written(good):
    good.write_bytes(good.read_bytes() + b"\0")
    assert assert_never_wrong(good)


def test_one_bit_flipped_in_every_byte(good):
    whole = good.read_bytes()
    draw = random.Random(0)
    with good.open("r+b", buffering=0) as opened:
        for place, byte in enumerate(whole):
            os.pwrite(opened.fileno(), bytes([byte ^ 1 << draw.randrange(8)]), place)
            assert assert_never_wrong(good), place
            os.pwrite(opened.fileno(), bytes([byte]), place)
    assert_same(read(good), content())


@pytest.mark.parametrize("page", [512, 4096])
def test_zeroed_pages(good, page):
    whole = good.read_bytes()
    noticed = 0
    for start in range(0, len(whole), page):
        spoiled = bytearray(whole)
        spoiled[start : start + page] = bytes(len(whole[start : start + page]))
        good.write_bytes(spoiled)
        noticed += assert_never_wrong(good)
        assert noticed or bytes(spoiled) == whole
    assert noticed


def test_swapped_halves_of_two_checkpoints(good, tmp_path):
    other = tmp_path / "other.h5"
    write(other, content(step=121, weight=0.75))
    one, two = good.read_bytes(), other.read_bytes()
    half = len(one) // 2
    good.write_bytes(one[:half] + two[half:])
    assert assert_never_wrong(good)


def test_damaged_bytes_never_reach_libhdf5(good, monkeypatch):
    """It loops for ever on some: a bit of a free-list pointer is enough (seen with HDF5 2.0.0)."""

    def reached(*_, **__):
        raise AssertionError("HDF5 saw damaged bytes")

    spoiled = bytearray(good.read_bytes())
    spoiled[2552] ^= 4
    good.write_bytes(spoiled)
    monkeypatch.setattr(layout.h5py, "File", reached)
    with pytest.raises(
        CheckpointError, match=r"damaged: bytes 512 to .* do not match their checksum"
    ):
        read(good)


def test_an_error_of_the_file_system_is_no_traceback(good, monkeypatch):
    def broken(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(seal, "is_sealed", broken)
    with pytest.raises(CheckpointError, match=r"\.h5: cannot be read: Input/output error"):
        read(good)


def test_not_a_checkpoint(tmp_path):
    def hdf5(path):
        with h5py.File(path, "w") as opened:
            opened["x"] = 1

    made = {
        "missing.h5": (lambda path: None, "no such file"),
        "folder.h5": (os.mkdir, "not a file"),
        "fifo.h5": (os.mkfifo, "not a file"),
        "foreign.h5": (hdf5, "an HDF5 file, but no checkpoint"),
        "text.txt": (lambda path: path.write_text("hello"), "not a checkpoint"),
        "empty.txt": (lambda path: path.touch(), "not a checkpoint"),
    }
    for name, (make, message) in made.items():
        make(tmp_path / name)
        with pytest.raises(NotACheckpointError, match=f"{name}: {message}"):
            read(tmp_path / name)


@pytest.mark.parametrize(
    "found", [b"", b"hello", b"hpc-absa", bytes(4096), b"hpc-absa checkpoint\n"]
)
def test_named_as_a_checkpoint_but_none(path, found):
    path.write_bytes(found)
    with pytest.raises(CheckpointError, match="damaged") as caught:
        read(path)
    assert not isinstance(caught.value, NotACheckpointError)


def test_a_copy_elsewhere_under_another_name_is_as_good(good, tmp_path):
    shutil.copy(good, tmp_path / "copy.backup")
    assert_same(read(tmp_path / "copy.backup"), content())


@pytest.mark.parametrize("place", ["first", "last", "end of a checksum's bytes", "begin of one's"])
def test_a_byte_that_reads_back_otherwise_is_noticed_wherever_it_is(path, monkeypatch, place):
    """Over arrays that begin and end within the bytes of one checksum and of several."""
    draw = np.random.default_rng(0)
    sizes = {"a": 3, "b": 2 * seal.CHUNK + 5, "c": 1000, "d": seal.CHUNK - 7, "e": 0, "f": 9}
    arrays = {key: draw.integers(0, 256, size, np.uint8) for key, size in sizes.items()}
    wanted = Content({}, {"model": Group({}, arrays)})
    write(path, wanted)
    assert_same(read(path), wanted)
    sign = layout.sign

    def spoil(temporary, digest):
        sign(temporary, digest)
        block, starts = seal.block_size(wanted.nbytes()), layout.outline(temporary).places
        long = starts["model", "b"].start
        at = {
            "first": starts["model", "a"].start,
            "last": starts["model", "f"].start + 8,
            "end of a checksum's bytes": block
            + seal.CHUNK * (1 + (long - block) // seal.CHUNK)
            - 1,
            "begin of one's": block + seal.CHUNK * (1 + (long - block) // seal.CHUNK),
        }[place]
        with temporary.open("r+b") as opened:
            byte = os.pread(opened.fileno(), 1, at)
            os.pwrite(opened.fileno(), bytes([byte[0] ^ 1]), at)

    monkeypatch.setattr(layout, "sign", spoil)
    with pytest.raises(CheckpointError, match="what was read back is not what was written"):
        write(path, wanted)
    assert_same(read(path), wanted)
