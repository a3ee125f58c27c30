import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpc_absa.data.packed import open_packed
from hpc_absa.data.packing import write_packed
from hpc_absa.data.prepare import describe, pack, packed_beside, prepare
from hpc_absa.data.sources import Samples, Source
from hpc_absa.errors import HpcAbsaError, UsageError
from hpc_absa.rundir import RunDir
from hpc_absa.training.data import packed_path
from tests.data.packed_files import check_content
from tests.supervisor.digits import digits


def random_source(train=50, test=20, shape=(3, 8, 8), classes=5, seed=0):
    random = np.random.default_rng(seed)
    return Source.from_arrays(
        random.integers(0, 256, (train, *shape), dtype=np.uint8),
        random.permutation(np.arange(train) % classes),
        random.integers(0, 256, (test, *shape), dtype=np.uint8),
        np.arange(test) % classes,
        classes=[f"class {i}" for i in range(classes)],
    )


def arrays(samples):
    return np.concatenate(list(samples.blocks()))


def one_line(error):
    return "\n" not in str(error.value)


@pytest.fixture
def packed(tmp_path):
    return write_packed(tmp_path / "set.h5", random_source(), "some", {"image_size": 8})


def test_round_trip(packed):
    source = random_source()
    for split, samples in ((packed.train, source.train), (packed.test, source.test)):
        assert np.array_equal(split.images, arrays(samples))
        assert np.array_equal(split.labels, samples.labels)
        assert split.labels.dtype == np.int64
        assert not split.images.flags.writeable
    assert (packed.name, packed.arguments) == ("some", {"image_size": 8})
    assert packed.classes == tuple(f"class {i}" for i in range(5))
    assert (packed.channels, packed.image_size, packed.shape) == (3, 8, (3, 8, 8))
    check_content(packed)


def test_mean_and_std_are_those_of_the_training_pixels(packed):
    pixels = packed.train.images / 255.0
    assert packed.mean == pytest.approx(pixels.mean((0, 2, 3)), rel=1e-12)
    assert packed.std == pytest.approx(pixels.std((0, 2, 3)), rel=1e-12)


def test_any_hdf5_tool_reads_it(packed):
    with h5py.File(packed.path) as file:
        assert file.attrs["format"] == b"hpc-absa-data"
        assert file.attrs["format_version"] == 1
        assert file.attrs["digest"].decode() == packed.digest
        assert np.array_equal(file["train/images"][()], packed.train.images)
        assert np.array_equal(file["test/labels"][()], packed.test.labels)
        assert file["train/images"].chunks is None


def test_arrays_are_mapped_and_not_copied(packed):
    with open(packed.path, "r+b") as file, h5py.File(packed.path) as hdf5:
        file.seek(hdf5["train/images"].id.get_offset())
        file.write(bytes([packed.train.images[0, 0, 0, 0] ^ 255]))
        file.flush()
    assert packed.train.images[0, 0, 0, 0] ^ 255 == arrays(random_source().train)[0, 0, 0, 0]
    with pytest.raises(HpcAbsaError, match="content and digest differ"):
        check_content(packed)


def test_the_digest_depends_on_the_content_only(tmp_path, packed):
    again = write_packed(tmp_path / "again.h5", random_source(), "other name")
    assert again.digest == packed.digest
    assert write_packed(tmp_path / "b.h5", random_source(seed=1), "some").digest != packed.digest
    source = random_source()
    renamed = Source(source.train, source.test, tuple("abcde"))
    assert write_packed(tmp_path / "c.h5", renamed, "some").digest != packed.digest


def test_blocks_of_any_size_make_the_same_data_set(tmp_path, packed):
    source = random_source()
    images = arrays(source.train)

    def blocks():
        yield images[:1]
        yield images[1:38]
        yield images[38:]

    train = Samples(source.train.labels, images.shape[1:], images.dtype, blocks)
    again = write_packed(
        tmp_path / "again.h5", Source(train, source.test, source.classes), "some", {"image_size": 8}
    )
    assert again.digest == packed.digest
    assert np.array_equal(again.train.images, packed.train.images)
    assert np.array_equal(again.mean, packed.mean)


def test_feature_vectors_are_stored_unchanged(tmp_path):
    features = np.random.default_rng(0).normal(size=(30, 7))
    source = Source.from_arrays(features, np.arange(30) % 3, features[:6], np.arange(6) % 3)
    packed = write_packed(tmp_path / "set.h5", source, "mine")
    assert np.array_equal(packed.train.images, features.astype(np.float32))
    assert (packed.channels, packed.image_size, packed.is_image) == (7, 1, False)
    assert packed.mean.tolist() == [0.0] * 7
    assert packed.std.tolist() == [1.0] * 7


def test_a_given_mean_and_std_are_kept(tmp_path):
    features = np.ones((4, 2), np.float32)
    labels = np.array([0, 1, 0, 1])
    source = Source.from_arrays(features, labels, features, labels, mean=[1, 2], std=[3, 4])
    packed = write_packed(tmp_path / "set.h5", source, "mine")
    assert (packed.mean.tolist(), packed.std.tolist()) == ([1, 2], [3, 4])


def test_a_constant_channel_does_not_divide_by_zero(tmp_path):
    images = np.zeros((4, 1, 2, 2), np.uint8)
    source = Source.from_arrays(images, [0, 1, 0, 1], images, [0, 1, 0, 1])
    assert write_packed(tmp_path / "set.h5", source, "mine").std.tolist() == [1.0]


def test_many_classes(tmp_path):
    # More than the 64 KiB that HDF5 allows an attribute.
    names = tuple(f"n{i:08d} some long name of a class" for i in range(20_000))
    source = random_source()
    packed = write_packed(tmp_path / "a.h5", Source(source.train, source.test, names), "big")
    assert packed.classes == names
    check_content(packed)


# --- damage and misuse ------------------------------------------------------------------------


def test_missing(tmp_path):
    with pytest.raises(UsageError, match="no packed data set here; make one with") as error:
        open_packed(tmp_path / "set.h5")
    assert one_line(error)


def test_not_hdf5(tmp_path):
    (tmp_path / "set.h5").write_text("hello")
    with pytest.raises(UsageError, match="not an HDF5 file"):
        open_packed(tmp_path / "set.h5")


def test_another_hdf5_file(tmp_path):
    with h5py.File(tmp_path / "set.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(UsageError, match="but not a data set packed by"):
        open_packed(tmp_path / "set.h5")


@pytest.mark.parametrize("kept", [0.99, 0.5, 0.1, 0.02])
def test_truncated(packed, kept):
    size = packed.path.stat().st_size
    os.truncate(packed.path, int(size * kept))
    with pytest.raises(HpcAbsaError, match=r"set.h5: damaged .*; pack it again") as error:
        open_packed(packed.path)
    assert one_line(error)


@pytest.mark.timeout(60)
def test_a_flipped_bit_is_detected_or_has_no_effect(tmp_path):
    # With strings of variable length HDF5 did not return after some of these flips.
    packed = write_packed(
        tmp_path / "set.h5", random_source(4, 3, (1, 2, 2), 3), "some", {"a": "b"}
    )
    good = packed.path.read_bytes()
    random = np.random.default_rng(0)
    detected = 0
    for place in random.choice(len(good), 400):
        damaged = bytearray(good)
        damaged[place] ^= 1 << int(random.integers(8))
        path = tmp_path / "damaged.h5"
        path.write_bytes(damaged)
        try:
            opened = open_packed(path)
            check_content(opened)
        except HpcAbsaError:
            detected += 1
        else:
            assert np.array_equal(opened.train.images, packed.train.images)
            assert (opened.name, opened.arguments) == ("some", {"a": "b"})
    assert detected > 200


def test_newer_version(packed):
    with h5py.File(packed.path, "r+") as file:
        file.attrs["format_version"] = 3
    with pytest.raises(UsageError, match="format version 3, this hpc-absa reads up to 2"):
        open_packed(packed.path)


def replace(path, name, value):
    with h5py.File(path, "r+") as file:
        del file[name]
        file[name] = value


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "train/labels",
            np.zeros(49, np.int64),
            r"int64 \[49\], expected one for each of the 50 s",
        ),
        ("test/labels", np.zeros(20, np.int32), r"/test has labels int32 and .*, expected int64"),
        ("test/labels", np.full(20, 5), r"test labels are from 5 to 5, expected 0 to 4"),
        ("test/images", np.zeros((20, 3, 8, 8), np.int16), r"images int16, expected .* uint8 or"),
        ("test/images", np.zeros((20, 3, 4, 4), np.uint8), r"\[3, 8, 8\] and .* \[3, 4, 4\]"),
    ],
)
def test_wrong_shapes(packed, name, value, message):
    replace(packed.path, name, value)
    with pytest.raises(HpcAbsaError, match=message):
        open_packed(packed.path)


@pytest.mark.parametrize("name", ["train/images", "test", "classes"])
def test_something_is_missing(packed, name):
    with h5py.File(packed.path, "r+") as file:
        del file[name]
    with pytest.raises(HpcAbsaError, match="damaged"):
        open_packed(packed.path)


def test_mean_of_another_number_of_channels(packed):
    with h5py.File(packed.path, "r+") as file:
        file.attrs["mean"] = np.zeros(4)
    with pytest.raises(HpcAbsaError, match=r"mean has shape .4., expected one number"):
        open_packed(packed.path)


def test_a_failing_source_leaves_nothing_behind(tmp_path):
    source = random_source()

    def blocks():
        yield arrays(source.train)[:10]
        raise KeyboardInterrupt

    train = Samples(source.train.labels, source.train.shape, source.train.dtype, blocks)
    (tmp_path / "set.h5").write_text("former")
    with pytest.raises(KeyboardInterrupt):
        write_packed(tmp_path / "set.h5", Source(train, source.test, source.classes), "some")
    assert [entry.name for entry in tmp_path.iterdir()] == ["set.h5"]
    assert (tmp_path / "set.h5").read_text() == "former"


@pytest.mark.parametrize(("count", "counted"), [(49, "49"), (51, "more")])
def test_a_source_with_another_number_of_images(tmp_path, count, counted):
    source = random_source()
    images = arrays(random_source(train=count).train)
    train = Samples(source.train.labels, images.shape[1:], images.dtype, lambda: iter([images]))
    with pytest.raises(UsageError, match=f"the train set has 50 labels but {counted} images"):
        write_packed(tmp_path / "set.h5", Source(train, source.test, source.classes), "some")
    assert not list(tmp_path.iterdir())


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from hpc_absa.data.packing import write_packed
from hpc_absa.data.sources import Source
from hpc_absa.errors import HpcAbsaError
from tests.data.packed_files import check_content

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
images = np.zeros((1000, 3, 16, 16), np.uint8)
source = Source.from_arrays(images, np.arange(1000) % 3, images, np.arange(1000) % 3)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    write_packed(Path(sys.argv[1]), source, "some")
except HpcAbsaError as error:
    print(error)
    sys.exit(7)
"""


@pytest.mark.parametrize("limit", [0, 1000, 500_000, 1_500_000])
def test_a_write_that_fails_is_an_error_and_leaves_nothing_behind(tmp_path, limit):
    # The kernel refuses writes past a chosen size, as it does on a full disk.
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "set.h5"), str(limit)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 7, ended.stderr
    assert re.search(r"set.h5: cannot be written \(.*File too large.*1.5 MB there", ended.stdout)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HpcAbsaError, match="cannot be written"):
        write_packed(tmp_path / "file" / "set.h5", random_source(), "some")


# --- sources from arrays ----------------------------------------------------------------------

IMAGES = np.zeros((4, 1, 2, 2), np.uint8)
LABELS = np.array([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((IMAGES[:, 0], LABELS, IMAGES, LABELS), r"train images are uint8 \[4, 2, 2\], expected"),
        ((IMAGES.astype(int), LABELS, IMAGES, LABELS), "train images are int64"),
        ((IMAGES, LABELS[:3], IMAGES, LABELS), r"train labels are int64 \[3\], expected one for"),
        ((IMAGES, LABELS, IMAGES, LABELS * 1.0), "test labels float32"),
        ((IMAGES, LABELS, IMAGES[:0], LABELS[:0]), "the test set is empty"),
        ((IMAGES, LABELS, IMAGES, LABELS, ["a"]), "train labels are from 0 to 1, expected 0 to 0"),
        ((IMAGES, LABELS - 1, IMAGES, LABELS), "train labels are from -1 to 0"),
        ((IMAGES, LABELS, IMAGES[..., :1], LABELS), "expected the same"),
        ((IMAGES, LABELS, IMAGES, LABELS, None, [1, 2]), "one number for each of 1 channels"),
    ],
)
def test_arrays_that_do_not_fit(arguments, message):
    with pytest.raises(UsageError, match=message) as error:
        Source.from_arrays(*arguments)
    assert one_line(error)


# --- prepare and describe ---------------------------------------------------------------------


def test_prepare_packs_once(tmp_path):
    path = tmp_path / "folder" / "digits.h5"
    first = prepare("digits", None, {}, path)
    stamp = path.stat().st_mtime_ns
    assert prepare("digits", None, {}, path).digest == first.digest
    assert path.stat().st_mtime_ns == stamp


def test_prepare_refuses_another_data_set(packed):
    message = r"holds some \(image_size = 8\), expected some \(image_size = 16\)"
    with pytest.raises(UsageError, match=message):
        prepare("some", None, {"image_size": 16}, packed.path)
    assert prepare("some", Path("/not/there"), {"image_size": 8}, packed.path)


def test_a_packed_file_beside_a_folder_that_cannot_be_written_is_used(
    packed, tmp_path, monkeypatch
):
    run = RunDir(tmp_path / "run")
    monkeypatch.setattr(os, "access", lambda *_: False)  # permissions do not hold for root

    def used(size):
        data = f"data={{name='some', root='{tmp_path}/set', image_size={size}}}"
        return packed_path(digits(data), run)

    assert used(8) == packed.path
    assert used(16) == run.data / "some.h5"
    run.data.mkdir(parents=True)
    (run.data / "some.h5").touch()
    assert used(8) == run.data / "some.h5"  # which the run has used before


def test_describe_goes_into_json(packed):
    described = json.loads(json.dumps(describe(packed.path)))
    assert (described["train"], described["test"]) == (50, 20)
    assert described["shape"] == [3, 8, 8]
    assert described["bytes"] == packed.path.stat().st_size


def test_a_copied_file_can_be_opened(packed, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    copy = shutil.copy(packed.path, tmp_path / "elsewhere")
    check_content(open_packed(Path(copy)))


@pytest.mark.parametrize("foreign", ["text", "hdf5"])
def test_another_file_is_not_replaced(tmp_path, foreign):
    path = tmp_path / "cats.h5"
    if foreign == "text":
        path.write_text("my notes")
    else:
        with h5py.File(path, "w") as file:
            file["mine"] = [1, 2, 3]
    before = path.read_bytes()
    with pytest.raises(UsageError, match="is not a data set packed by hpc-absa"):
        pack("digits", None, {}, path)
    assert path.read_bytes() == before


def test_a_packed_file_is_replaced(tmp_path):
    path = tmp_path / "digits.h5"
    first = pack("digits", None, {}, path)
    assert pack("digits", None, {}, path).digest == first.digest


def test_the_packed_file_is_named_after_the_folder(tmp_path, monkeypatch):
    (tmp_path / "cats").mkdir()
    monkeypatch.chdir(tmp_path / "cats")
    for root in (Path("."), Path("../cats"), Path("../cats/")):
        assert packed_beside(root) == tmp_path / "cats.h5"
    with pytest.raises(UsageError, match="expected the folder of a data set"):
        packed_beside(Path("/"))
