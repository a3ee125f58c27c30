"""What each kind of array, label and name becomes: converted exactly, or refused by name."""

from itertools import pairwise

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.preprocessing import StandardScaler

from hpc_absa.data.augment import normalise
from hpc_absa.data.packed import open_packed
from hpc_absa.data.packing import write_packed
from hpc_absa.data.prepare import describe, pack
from hpc_absa.data.registry import DATASETS, augmented_by_default
from hpc_absa.data.sources import Samples, Source
from hpc_absa.data.subset import subset
from hpc_absa.errors import HpcAbsaError, UsageError
from tests.data.packed_files import check_content

POINTS = np.arange(12.0).reshape(6, 2)
LABELS = np.array([0, 1, 2, 2, 1, 0])


def by_arrays(images, labels):
    return Samples.from_arrays(images, labels)


def by_blocks(images, labels):
    images = np.asarray(images)
    return Samples(labels, images.shape[1:], images.dtype, lambda: iter([images[:4], images[4:]]))


def packed_from(tmp_path, train, classes=("a", "b", "c"), **scale):
    test = Samples(train.labels, train.shape, train.dtype, train.blocks)
    return write_packed(tmp_path / "set.h5", Source(train, test, classes, **scale), "mine")


@pytest.fixture(params=[by_arrays, by_blocks])
def samples(request):
    return request.param


# --- labels -----------------------------------------------------------------------------------

INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", ">i4", ">i8"]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integer_labels_of_any_type_keep_their_values(tmp_path, samples, dtype):
    packed = packed_from(tmp_path, samples(POINTS, LABELS.astype(dtype)))
    assert (packed.train.labels.tolist(), packed.train.labels.dtype) == (LABELS.tolist(), np.int64)
    check_content(packed)


def test_boolean_labels_are_the_classes_0_and_1(tmp_path, samples):
    packed = packed_from(tmp_path, samples(POINTS, LABELS > 0))
    assert packed.train.labels.tolist() == [0, 1, 1, 1, 1, 0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS.astype(str), r"train labels are <U\d+ \[6\], expected integers"),
        (np.eye(3, dtype=int)[LABELS], r"train labels are int64 \[6, 3\], expected integers"),
        (np.zeros((6, 3, 1)), r"train labels are float64 \[6, 3, 1\], expected integers"),
        (LABELS[:5], r"train labels are int64 \[5\], expected one for each of the 6|5 labels but"),
        (np.eye(2)[LABELS % 2], r"labels are float32 \[6, 2\], and there are 3 classes"),
        (np.where(LABELS == 2, np.nan, 1), "the label of train sample 2 has NaN or infinite"),
        (LABELS * 1e300, "the label of train sample 1 has NaN or infinite"),
        (LABELS.astype(np.uint64) + 2**63, "train labels are from -9"),
        (LABELS - 1, "train labels are from -1 to 1, expected 0 to 2"),
        (np.ma.masked_equal(LABELS, 2), "train labels are a masked array"),
        ([[0], [1, 2], 0, 0, 0, 0], "train labels cannot be converted to a numpy array"),
    ],
)
def test_other_labels_are_refused(tmp_path, samples, labels, message):
    with pytest.raises(UsageError, match=message):
        packed_from(tmp_path, samples(POINTS, labels))


@pytest.mark.parametrize("dtype", ["float16", ">f8", "float32"])
@pytest.mark.parametrize("targets", [LABELS / 4, np.eye(3)[LABELS]])
def test_targets_of_floating_point_are_stored_as_float32(tmp_path, samples, targets, dtype):
    names = ("a", "b", "c") * (targets.ndim == 2)
    packed = packed_from(tmp_path, samples(POINTS, targets.astype(dtype)), names)
    assert packed.train.labels.dtype == np.float32
    assert np.array_equal(packed.train.labels, targets)
    assert packed.classes == names
    assert packed.offered.get("classes") == (3 if names else None)
    check_content(packed)
    assert np.array_equal(subset(packed, "test", 4).test.labels, packed.test.labels[[0, 1, 2, 4]])


def test_labels_of_two_kinds_are_refused():
    with pytest.raises(UsageError, match=r"float32 \[6\] and test labels int64 \[6\], expected"):
        Source.from_arrays(POINTS, LABELS / 2, POINTS, LABELS, range(3))


def test_labels_from_1_leave_a_class_without_samples_which_is_noted():
    source = Source.from_arrays(POINTS, LABELS + 1, POINTS, LABELS + 1)
    assert source.classes == ("0", "1", "2", "3")
    assert source.notes == {"classes without training samples": 1}


# --- values -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "longdouble", ">f4", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_floating_point_data_become_float32(tmp_path, samples, dtype, order):
    points = np.random.default_rng(0).normal(size=(6, 2, 3)).astype(dtype, order=order)
    packed = packed_from(tmp_path, samples(points, LABELS))
    assert np.array_equal(packed.train.images, points.astype(np.float32))
    assert (packed.train.images.dtype, packed.train.images.dtype.isnative) == (np.float32, True)
    check_content(packed)


def test_tensors_and_lists_are_arrays():
    tensors = Source.from_arrays(*[torch.tensor(POINTS), torch.tensor(LABELS)] * 2)
    lists = Source.from_arrays(*[POINTS.tolist(), LABELS.tolist()] * 2)
    for source in (tensors, lists):
        assert np.array_equal(next(source.train.blocks()), POINTS)
        assert source.train.labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("sample", [0, 5])
def test_values_that_are_not_finite_in_float32_are_refused(tmp_path, samples, value, sample):
    points = POINTS.copy()
    points[sample, 1] = value
    with pytest.raises(UsageError, match=f"train sample {sample} has NaN or infinite values"):
        packed_from(tmp_path, samples(points, LABELS))
    assert not list(tmp_path.iterdir())


IMAGES = np.zeros((6, 3, 8, 8), np.uint8)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (POINTS.astype(np.int64), r"train images are int64 \[6, 2\], expected uint8"),
        (
            POINTS.astype(np.uint8),
            r"train images are uint8 \[6, 2\], expected uint8 \[N, C, H, W\]",
        ),
        (POINTS.astype(complex), r"train images are complex128"),
        (IMAGES.astype(np.uint16), r"train images are uint16"),
        (IMAGES.transpose(0, 2, 3, 1), r"looks like \[H, W, C\], .*transpose\(0, 3, 1, 2\)"),
        (IMAGES[:, :, :0], r"train images are uint8 \[6, 3, 0, 8\]"),
        (np.zeros((6, 0)), r"train images are float64 \[6, 0\]"),
    ],
)
def test_other_data_are_refused(tmp_path, samples, images, message):
    with pytest.raises(UsageError, match=message):
        packed_from(tmp_path, samples(images, LABELS))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.ma.masked_greater(POINTS, 5), "train images are a masked array"),
        (torch.tensor(POINTS, requires_grad=True), "cannot be converted to a numpy array"),
        ([[1.0], [1.0, 2.0], [3.0], [4.0], [5.0], [6.0]], "cannot be converted to a numpy array"),
        (POINTS[:, 0], r"train images are float64 \[6\]"),
    ],
)
def test_what_is_no_array_is_refused(images, message):
    with pytest.raises(UsageError, match=message):
        Source.from_arrays(images, LABELS, POINTS, LABELS)


@pytest.mark.parametrize(
    ("block", "declared"),
    [
        (IMAGES.astype(np.int16), "uint8"),
        (IMAGES.astype(np.float32), "uint8"),
        (IMAGES, "float32"),
        (IMAGES[..., :7], "uint8"),
    ],
)
def test_blocks_that_differ_from_the_declaration_are_refused(tmp_path, block, declared):
    train = Samples(LABELS, (3, 8, 8), np.dtype(declared), lambda: iter([block]))
    with pytest.raises(UsageError, match=f"train images come as .* declares {declared}"):
        packed_from(tmp_path, train)


def test_declared_types_and_shapes_may_be_of_any_spelling(tmp_path):
    train = Samples(LABELS.tolist(), [np.int64(2)], "float64", lambda: iter([POINTS.tolist()]))
    packed = packed_from(tmp_path, train)
    assert np.array_equal(packed.train.images, POINTS)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 5)),
        st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6)),
    ),
    floating=st.sampled_from([None, "<f2", ">f4", "<f8"]),
    label_type=st.sampled_from(INTEGERS),
    cuts=st.lists(st.integers(0, 9), max_size=4),
    seed=st.integers(0, 1000),
)
def test_arrays_and_blocks_make_the_same_data_set(
    tmp_path_factory, shape, floating, label_type, cuts, seed
):
    if floating is None and len(shape) == 1:
        shape = (*shape, 1, 1)
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (9, *shape)).astype(floating or np.uint8)
    labels = (np.arange(9) % 3).astype(label_type)
    bounds = [0, *sorted(cuts), 9]
    blocks = [images[a:b] for a, b in pairwise(bounds)]  # some of them empty
    folder = tmp_path_factory.mktemp("files")
    digests = set()
    for name, train in (
        ("arrays", Samples.from_arrays(images, labels)),
        ("blocks", Samples(labels, shape, images.dtype, lambda: iter(blocks))),
    ):
        source = Source(train, Samples.from_arrays(images, labels), range(3))
        packed = write_packed(folder / name, source, "mine")
        assert np.array_equal(packed.train.images, images.astype(packed.train.images.dtype))
        check_content(packed)
        digests.add(packed.digest)
    assert len(digests) == 1


# --- mean and std -----------------------------------------------------------------------------


@pytest.mark.parametrize("constant", [0.0, 5.0, 0.1, 1e6 / 3])
def test_constant_features_are_divided_by_1(tmp_path, constant):
    points = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    points[:, 1] = constant
    labels = np.arange(60) % 3
    # Of float32 values, so that the std of 0.1 is not exactly 0.
    mean, std = points.mean(0), points.std(0)
    source = Source.from_arrays(points, labels, points, labels, mean=mean, std=std)
    packed = write_packed(tmp_path / "set.h5", source, "mine")
    assert packed.std[1] == 1.0
    assert packed.notes == {"constant channels, divided by 1": 1}
    inputs = normalise(
        torch.tensor(packed.train.images), torch.tensor(packed.mean), torch.tensor(packed.std)
    )
    assert inputs.isfinite().all()
    expected = StandardScaler().fit(points.astype(np.float64)).transform(points)
    expected[:, 1] = 0.0
    assert np.allclose(inputs, expected, atol=1e-5 * max(1.0, constant / 100))


def test_a_small_std_of_a_feature_that_varies_is_kept():
    source = Source.from_arrays(POINTS, LABELS, POINTS, LABELS, mean=[1e-9, 1.0], std=[1e-10, 1e-4])
    assert source.std.tolist() == [1e-10, 1e-4]


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ({"std": [-1, 1]}, r"std is \[-1.0, 1.0\], expected no negative numbers"),
        ({"std": [np.nan, 1]}, r"std is \[nan, 1.0\], expected finite numbers"),
        ({"mean": [np.inf, 1]}, r"mean is \[inf, 1.0\], expected finite numbers"),
        ({"mean": ["0", "1"]}, "mean is .*, expected finite numbers"),
        ({"mean": 0.5}, r"mean has shape \[\], expected one number for each of 2 channels"),
    ],
)
def test_other_mean_and_std_are_refused(scale, message):
    with pytest.raises(UsageError, match=message):
        Source.from_arrays(POINTS, LABELS, POINTS, LABELS, **scale)


def test_a_mean_of_pixels_from_0_to_255_is_refused():
    mean, std = [125.3, 123.0, 113.9], [63.0, 62.1, 66.7]
    with pytest.raises(UsageError, match="for images; divide mean and std by 255"):
        Source.from_arrays(IMAGES, LABELS, IMAGES, LABELS, mean=mean, std=std)


# --- class names ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        (range(3), ("0", "1", "2")),
        (np.arange(3), ("0", "1", "2")),
        (np.array(["ant", "bee", "cow"]), ("ant", "bee", "cow")),
        (np.array(["ant", "bee", "cow"], object), ("ant", "bee", "cow")),
        ([np.int64(7), np.uint8(8), 9], ("7", "8", "9")),
        ([b"ant", np.bytes_(b"bee"), "caf\u00e9".encode("latin-1")], ("ant", "bee", "café")),
        (["ant", "b\udce9b\udce9", "日本"], ("ant", "bébé", "日本")),
    ],
)
def test_class_names_become_strings(tmp_path, classes, names):
    packed = packed_from(tmp_path, by_arrays(POINTS, LABELS), classes)
    assert packed.classes == names
    check_content(packed)
    assert describe(packed.path)["classes"] == list(names)
    other = write_packed(
        tmp_path / "b.h5",
        Source(by_arrays(POINTS, LABELS), by_arrays(POINTS, LABELS), names),
        "mine",
    )
    assert other.digest == packed.digest


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("abc", "classes is a str, expected a list of names"),
        ({"a", "b", "c"}, "classes is a set, expected"),
        ({"a": 0, "b": 1, "c": 2}, "classes is a dict, expected"),
        (3, "classes is a int, expected"),
        (["a", None, "c"], r"classes\[1\] is a NoneType, expected a string"),
        (np.array([0.0, 1.0, 2.0]), r"classes\[0\] is a float64, expected a string"),
    ],
)
def test_other_class_names_are_refused(classes, message):
    with pytest.raises(UsageError, match=message):
        Source.from_arrays(POINTS, LABELS, POINTS, LABELS, classes)


# --- packed files of earlier versions and of other programs -----------------------------------


def edited(path, edit):
    with h5py.File(path, "r+") as file:
        edit(file)
    return open_packed(path)


def test_nan_in_a_packed_file_that_was_not_checked_is_refused(tmp_path):
    packed = packed_from(tmp_path, by_arrays(POINTS, LABELS))

    def as_packed_earlier(file):
        file["test/images"][3, 1] = np.nan
        del file.attrs["notes"]

    with pytest.raises(HpcAbsaError, match=r"set.h5: damaged \(test sample 3 has NaN"):
        edited(packed.path, as_packed_earlier)


def test_a_std_of_0_in_a_packed_file_divides_by_1(tmp_path):
    packed = packed_from(tmp_path, by_arrays(POINTS, LABELS), std=[1, 2], mean=[5, 6])
    opened = edited(packed.path, lambda file: file.attrs.update(std=[0.0, 2.0]))
    assert opened.std.tolist() == [1.0, 2.0]


def test_a_packed_file_without_notes_is_opened(tmp_path):
    packed = packed_from(tmp_path, by_arrays(IMAGES, LABELS))
    assert edited(packed.path, lambda file: file.attrs.pop("notes")).notes == {}


# --- augmentation -----------------------------------------------------------------------------


def test_user_defined_data_are_not_augmented_by_default():
    assert not augmented_by_default("mydata:images")
    assert [name for name in DATASETS if not augmented_by_default(name)] == ["digits"]


# --- files of others --------------------------------------------------------------------------


def test_a_file_that_appears_while_packing_is_not_replaced(tmp_path):
    path = tmp_path / "set.h5"

    def blocks():
        path.write_text("my notes")
        yield POINTS

    train = Samples(LABELS, (2,), POINTS.dtype, blocks)
    with pytest.raises(UsageError, match=r"set.h5: exists, and is not a data set packed by"):
        packed_from(tmp_path, train)
    assert path.read_text() == "my notes"
    assert list(tmp_path.iterdir()) == [path]


def test_another_packed_data_set_is_not_replaced(tmp_path):
    packed = packed_from(tmp_path, by_arrays(POINTS, LABELS))
    before = packed.path.read_bytes()
    with pytest.raises(UsageError, match=r"set.h5: holds mine, expected digits; remove the file"):
        pack("digits", None, {}, packed.path)
    assert packed.path.read_bytes() == before


def test_a_damaged_packed_file_is_replaced(tmp_path):
    path = tmp_path / "digits.h5"
    digest = pack("digits", None, {}, path).digest
    with h5py.File(path, "r+") as file:
        del file["classes"]
    assert pack("digits", None, {}, path).digest == digest


@pytest.mark.parametrize("exists", [True, False])
def test_a_symbolic_link_is_kept_and_its_target_written(tmp_path, exists):
    target, link = tmp_path / "scratch.h5", tmp_path / "digits.h5"
    if exists:
        pack("digits", None, {}, target)
    link.symlink_to(target)
    pack("digits", None, {}, link)
    assert link.is_symlink()
    assert len(open_packed(target).train) == 1437


def test_a_link_to_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("my notes")
    (tmp_path / "digits.h5").symlink_to(tmp_path / "notes.txt")
    with pytest.raises(UsageError, match=r"notes.txt: exists, and is not a data set packed"):
        pack("digits", None, {}, tmp_path / "digits.h5")
    assert (tmp_path / "notes.txt").read_text() == "my notes"
