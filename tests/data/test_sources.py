import hashlib
import pickle

import numpy as np
import pytest
from PIL import Image

from hpc_absa.data.builtin import decode
from hpc_absa.data.prepare import pack
from hpc_absa.data.sources import Source, load
from hpc_absa.errors import HpcAbsaError, UsageError
from tests.data.packed_files import check_content


def image(value, size=(6, 6), mode="RGB"):
    return Image.new(mode, size, value)


def image_tree(root, test="test", classes=("cat", "dog", "emu"), size=(6, 6)):
    """Two training images and one test image a class, identified by their red value."""
    for part, count in (("train", 2), (test, 1)):
        for label, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                image((10 * label + i, 100, 200), size).save(folder / f"{i}.png")
    return root


def reds(split):
    return split.images[:, 0, 0, 0].tolist()


def one_line(error):
    return "\n" not in str(error.value)


# --- digits -----------------------------------------------------------------------------------


def test_digits_have_a_fixed_stratified_split(tmp_path):
    from sklearn.datasets import load_digits

    digits = pack("digits", None, {}, tmp_path / "digits.h5")
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert (digits.shape, digits.classes) == ((1, 8, 8), tuple("0123456789"))
    total = np.bincount(load_digits().target)
    assert np.abs(np.bincount(digits.test.labels) - total / 5).max() < 1
    together = np.concatenate([digits.train.images, digits.test.images])[:, 0]
    original = np.rint(load_digits().images * 255 / 16).astype(np.uint8)
    assert sorted(map(bytes, together)) == sorted(map(bytes, original))
    # Fixed, because accuracies are compared between versions of this package.
    assert digits.digest == DIGITS_DIGEST


DIGITS_DIGEST = "3fe6de2416fb6e73972102f5c79ea0e0b89041d3f5ac53306e256fde69ab6c27"


# --- folders ----------------------------------------------------------------------------------


@pytest.mark.parametrize("test", ["test", "val"])
@pytest.mark.parametrize("name", ["imagefolder", "cifar10", "cifar100"])
def test_folders_of_images(tmp_path, name, test):
    packed = pack(name, image_tree(tmp_path / "raw", test), {}, tmp_path / "set.h5")
    assert packed.classes == ("cat", "dog", "emu")
    assert packed.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert reds(packed.train) == [0, 1, 10, 11, 20, 21]
    assert (packed.test.labels.tolist(), reds(packed.test)) == ([0, 1, 2], [0, 10, 20])
    assert packed.train.images[0, :, 3, 3].tolist() == [0, 100, 200]
    check_content(packed)


def test_test_images_without_classes_are_not_the_test_set(tmp_path):
    root = image_tree(tmp_path / "raw", "val")
    (root / "test").mkdir()
    image(99).save(root / "test" / "ILSVRC2012_test_00000001.png")
    packed = pack("imagenet", root, {"image_size": 6}, tmp_path / "set.h5")
    assert (packed.test.labels.tolist(), reds(packed.test)) == ([0, 1, 2], [0, 10, 20])


def test_many_blocks_keep_the_order(tmp_path, monkeypatch):
    monkeypatch.setattr("hpc_absa.data.builtin._BLOCK_PIXELS", 4 * 36)
    root = image_tree(tmp_path / "raw", classes=[f"c{i:02d}" for i in range(9)])
    seen = []
    monkeypatch.setattr("hpc_absa.data.prepare.progress_bar", lambda title: progress(seen))
    packed = pack("imagefolder", root, {}, tmp_path / "set.h5", progress=True)
    assert reds(packed.train) == [10 * label + i for label in range(9) for i in range(2)]
    assert seen == [(4, 27), (8, 27), (12, 27), (16, 27), (18, 27), (22, 27), (26, 27), (27, 27)]


class progress:  # noqa: N801
    def __init__(self, seen):
        self.seen = seen

    def __enter__(self):
        return lambda *counts: self.seen.append(counts)

    def __exit__(self, *_):
        pass


def test_the_progress_bar_goes_to_standard_error(tmp_path, capsys):
    pack("imagefolder", image_tree(tmp_path / "raw"), {}, tmp_path / "set.h5", progress=True)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "9/9" in printed.err


def test_larger_images_are_cropped_around_the_centre_and_resized(tmp_path):
    wide = Image.new("RGB", (60, 20), (255, 0, 0))
    wide.paste((0, 0, 255), (20, 0, 40, 20))
    wide.save(tmp_path / "wide.png")
    assert decode(tmp_path / "wide.png", 10)[:, 5, 5].tolist() == [0, 0, 255]
    # The outermost columns blend with their neighbours outside of the square.
    assert (decode(tmp_path / "wide.png", 10)[2, :, 1:-1] == 255).all()
    root = image_tree(tmp_path / "raw", size=(60, 20))
    packed = pack("imagenet", root, {"image_size": 16}, tmp_path / "set.h5")
    assert packed.shape == (3, 16, 16)
    assert packed.arguments == {"image_size": 16}


@pytest.mark.parametrize(("mode", "value"), [("L", 7), ("RGBA", (7, 7, 7, 255)), ("1", 1)])
def test_other_colour_modes_become_rgb(tmp_path, mode, value):
    image(value, mode=mode).save(tmp_path / "a.png")
    assert decode(tmp_path / "a.png", None).shape == (3, 6, 6)


def test_missing_root(tmp_path):
    with pytest.raises(UsageError, match=r"data.root: .*/raw does not exist; it should hold"):
        load("imagefolder", tmp_path / "raw", {})


def test_no_root():
    with pytest.raises(UsageError, match=r"data.root: imagefolder needs this argument"):
        load("imagefolder", None, {})


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_part_is_missing(tmp_path, part):
    image_tree(tmp_path)
    (tmp_path / part).rename(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=f"data.root: no folder .*/{part}; expected") as error:
        load("imagefolder", tmp_path, {})
    assert one_line(error)


def test_empty_class_folder(tmp_path):
    (image_tree(tmp_path) / "train" / "fox").mkdir()
    (tmp_path / "train" / "fox" / "notes.txt").write_text("")
    with pytest.raises(UsageError, match=r"no images of class fox in .*/train; ") as error:
        load("imagefolder", tmp_path, {})
    assert one_line(error)


def test_no_class_folders(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    with pytest.raises(UsageError, match=r"no class folders in .*/train"):
        load("imagefolder", tmp_path, {})


def test_classes_differ(tmp_path):
    (image_tree(tmp_path) / "test" / "dog").rename(tmp_path / "test" / "wolf")
    with pytest.raises(UsageError, match=r"different classes \(dog, wolf in one of them only\)"):
        load("imagefolder", tmp_path, {})


@pytest.mark.parametrize("damage", ["truncated", "text"])
def test_an_unreadable_image_is_named_and_nothing_is_left(tmp_path, damage):
    root = image_tree(tmp_path / "raw")
    noise = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    bad = root / "train" / "dog" / "1.jpg"
    Image.fromarray(noise).save(bad)
    content = bad.read_bytes()
    bad.write_bytes(content[:-80] if damage == "truncated" else b"not an image")
    with pytest.raises(HpcAbsaError, match=r"train/dog/1.jpg: unreadable image") as error:
        pack("imagefolder", root, {}, tmp_path / "set.h5")
    assert one_line(error)
    assert [entry.name for entry in tmp_path.iterdir()] == ["raw"]


def test_images_of_different_sizes(tmp_path):
    root = image_tree(tmp_path / "raw")
    image((1, 2, 3), (8, 6)).save(root / "train" / "dog" / "1.png")
    with pytest.raises(UsageError, match=r"dog/1.png: 8 × 6 pixels, others 6 × 6; set data.im"):
        pack("imagefolder", root, {}, tmp_path / "set.h5")
    assert pack("imagefolder", root, {"image_size": 6}, tmp_path / "set.h5").shape == (3, 6, 6)


@pytest.mark.parametrize("size", [0, -1, 2.5, "big"])
def test_wrong_image_size(tmp_path, size):
    with pytest.raises(UsageError, match=r"data.image_size: .*, expected pixels"):
        load("imagefolder", image_tree(tmp_path), {"image_size": size})


# --- published layouts ------------------------------------------------------------------------


def cifar_release(root, monkeypatch, kind="CIFAR10"):
    """A tiny release in torchvision's original layout, with matching checksums."""
    from hpc_absa.torchvision_import import torchvision

    dataset = getattr(torchvision().datasets, kind)
    folder = root / dataset.base_folder
    folder.mkdir(parents=True)
    key = "labels" if kind == "CIFAR10" else "fine_labels"
    names_key = dataset.meta["key"]
    batches = {"train_list": 2, "test_list": 1}
    for attribute, count in batches.items():
        written = []
        for number in range(count):
            rows = np.arange(3, dtype=np.uint8)[:, None] + np.zeros((3, 3072), np.uint8)
            rows[:, 1024:2048] = 50 + number
            content = pickle.dumps({"data": rows, key: [0, 1, 2]})
            name = f"{attribute}_{number}"
            (folder / name).write_bytes(content)
            written.append((name, hashlib.md5(content).hexdigest()))
        monkeypatch.setattr(dataset, attribute, written)
    content = pickle.dumps({names_key: ["ant", "bee", "cow"]})
    (folder / "meta").write_bytes(content)
    meta = {**dataset.meta, "filename": "meta", "md5": hashlib.md5(content).hexdigest()}
    monkeypatch.setattr(dataset, "meta", meta)
    return folder


@pytest.mark.parametrize(("name", "kind"), [("cifar10", "CIFAR10"), ("cifar100", "CIFAR100")])
@pytest.mark.parametrize("given_folder", [False, True])
def test_cifar_in_its_original_layout(tmp_path, monkeypatch, name, kind, given_folder):
    folder = cifar_release(tmp_path / "raw", monkeypatch, kind)
    root = folder if given_folder else tmp_path / "raw"
    packed = pack(name, root, {}, tmp_path / "set.h5")
    assert packed.shape == (3, 32, 32)
    assert packed.classes == ("ant", "bee", "cow")
    assert packed.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert reds(packed.train) == [0, 1, 2, 0, 1, 2]
    assert packed.train.images[:, 1, 5, 5].tolist() == [50, 50, 50, 51, 51, 51]
    assert len(packed.test) == 3


def test_a_damaged_release(tmp_path, monkeypatch):
    folder = cifar_release(tmp_path, monkeypatch)
    (folder / "train_list_1").write_bytes(b"something else")
    with pytest.raises(HpcAbsaError, match=r"files of CIFAR10 in .* are missing or damaged"):
        load("cifar10", tmp_path, {})


def test_neither_release_nor_folders(tmp_path):
    with pytest.raises(UsageError, match=r"neither .*/cifar-10-batches-py .* nor .*/train/<class>"):
        load("cifar10", tmp_path, {})


def test_svhn(tmp_path, monkeypatch):
    from scipy.io import savemat

    from hpc_absa.torchvision_import import torchvision

    with pytest.raises(UsageError, match=r"no file .*/train_32x32.mat"):
        load("svhn", tmp_path, {})
    splits = {}
    for name in ("train", "test"):
        images = np.arange(4, dtype=np.uint8) + np.zeros((32, 32, 3, 4), np.uint8)
        # The release calls the digit 0 class 10.
        savemat(tmp_path / f"{name}_32x32.mat", {"X": images, "y": np.array([[10], [1], [2], [9]])})
        digest = hashlib.md5((tmp_path / f"{name}_32x32.mat").read_bytes()).hexdigest()
        splits[name] = ["", f"{name}_32x32.mat", digest]
    monkeypatch.setattr(torchvision().datasets.SVHN, "split_list", splits)
    packed = pack("svhn", tmp_path, {}, tmp_path / "set.h5")
    assert packed.train.labels.tolist() == [0, 1, 2, 9]
    assert reds(packed.train) == [0, 1, 2, 3]
    assert packed.shape == (3, 32, 32)


@pytest.mark.parametrize("nested", [False, True])
def test_tiny_imagenet_as_published(tmp_path, nested):
    base = tmp_path / "tiny-imagenet-200" if nested else tmp_path
    for label, wnid in enumerate(["n01", "n02"]):
        folder = base / "train" / wnid / "images"
        folder.mkdir(parents=True)
        image((label, 0, 0), (64, 64)).save(folder / f"{wnid}_0.png")
    (base / "val" / "images").mkdir(parents=True)
    for name, red in (("val_0.png", 11), ("val_1.png", 10)):
        image((red, 0, 0), (64, 64)).save(base / "val" / "images" / name)
    (base / "val" / "val_annotations.txt").write_text(
        "val_0.png\tn02\t0\t0\t62\t62\nval_1.png\tn01\t0\t0\t62\t62\n"
    )
    packed = pack("tinyimagenet", tmp_path, {}, tmp_path / "set.h5")
    assert (packed.classes, packed.shape) == (("n01", "n02"), (3, 64, 64))
    assert (packed.test.labels.tolist(), reds(packed.test)) == ([1, 0], [11, 10])
    assert reds(packed.train) == [0, 1]


def test_tiny_imagenet_without_its_training_images(tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "val_annotations.txt").write_text("")
    with pytest.raises(UsageError, match=r"data.root: .*/train: No such file or directory"):
        load("tinyimagenet", tmp_path, {})


# --- user-defined -----------------------------------------------------------------------------

OWN = """
import numpy as np
from hpc_absa.data.sources import Source

def waves(root, count: int = 10):
    return made(count, (root / "hint.txt").read_text())

def plain():
    return made(4, "")

def made(count, text):
    x = np.random.default_rng(0).normal(size=(count, 3)).astype(np.float32)
    y = np.arange(count) % 2
    return Source.from_arrays(x, y, x, y, classes=[text + "up", text + "down"])

def wrong():
    return [1, 2]
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_data.py").write_text(OWN)
    (tmp_path / "hint.txt").write_text("go ")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_user_defined_data_set(own):
    packed = pack("own_data:waves", own, {"count": 6}, own / "set.h5")
    assert packed.classes == ("go up", "go down")
    assert (len(packed.train), packed.channels, packed.is_image) == (6, 3, False)


def test_root_is_passed_only_if_the_function_takes_it(own):
    assert isinstance(load("own_data:plain", own, {}), Source)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("own_data:waves", {"size": 1}, "data.size: own_data:waves has no such argument; .* count"),
        ("own_data:plain", {"size": 1}, "data.size: .* has no such argument; it takes none"),
        ("own_data:wrong", {}, "own_data:wrong returned list, expected a Source"),
        ("own_data:absent", {}, 'data.name: module "own_data" has no "absent"'),
        ("cifar", {}, r'no data set "cifar"; did you mean cifar10 .*Known are digits, imagefolder'),
        ("digits", {"image_size": 8}, "data.image_size: digits has no such argument"),
    ],
)
def test_misuse(own, name, arguments, message):
    with pytest.raises(UsageError, match=message) as error:
        load(name, own, arguments)
    assert one_line(error)
