"""What each kind of file and image in a folder becomes: torchvision's pixels, or an error."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from hpc_absa.cli import app
from hpc_absa.data.builtin import decode
from hpc_absa.data.packed import open_packed
from hpc_absa.data.prepare import pack
from hpc_absa.data.sources import load
from hpc_absa.errors import HpcAbsaError, UsageError
from hpc_absa.torchvision_import import torchvision
from tests.data.packed_files import check_content

RANDOM = np.random.default_rng(0)
RGB = Image.fromarray(RANDOM.integers(0, 256, (6, 8, 3), dtype=np.uint8))
OTHER = Image.fromarray(RANDOM.integers(0, 256, (6, 8, 3), dtype=np.uint8))
GREY = RGB.convert("L")
GREY16 = Image.fromarray(RANDOM.integers(0, 65536, (6, 8), dtype=np.uint16))
RGBA = RGB.convert("RGBA")
RGBA.putalpha(GREY)
ROTATED = Image.Exif()
ROTATED[0x0112] = 6  # a camera held upright
ENCODED = {"image_size": 4, "encoded": True}
FRAMES = {"save_all": True, "append_images": [OTHER]}

TRANSPARENT = "images with transparency, which was dropped"
SEVERAL = "images of several frames, the first one used"
TURNED = "images with an EXIF orientation, which was not applied"
HIDDEN = "hidden files and folders, left out"
OUTSIDE = "files outside of the class folders, left out"


def folders(root, classes=("a", "b")):
    """A data set of one PNG for each class and part; returns the training folder."""
    for part in ("train", "test"):
        for name in classes:
            folder = Path(os.fsdecode(os.path.join(os.fsencode(root / part), os.fsencode(name))))
            folder.mkdir(parents=True)
            RGB.save(folder / "0.png")
    return root / "train"


def by_torchvision(folder):
    """Pixels [N, 3, H, W], labels and classes of torchvision's `ImageFolder`."""
    dataset = torchvision().datasets.ImageFolder(str(folder), is_valid_file=lambda path: True)
    images = [np.asarray(image).transpose(2, 0, 1) for image, _ in dataset]
    return np.stack(images), dataset.targets, tuple(dataset.classes)


# --- images -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "image", "options", "note"),
    [
        ("grey.png", GREY, {}, None),
        ("grey.jpg", GREY, {}, None),
        ("bits.png", RGB.convert("1"), {}, None),
        ("palette.png", RGB.convert("P"), {}, None),
        ("palette.png", RGB.convert("P"), {"transparency": 3}, TRANSPARENT),
        ("palette.png", RGB.convert("P"), {"transparency": bytes(range(256))}, TRANSPARENT),
        ("palette.gif", RGB.convert("P"), {}, None),
        ("cmyk.jpg", RGB.convert("CMYK"), {}, None),
        ("cmyk.tif", RGB.convert("CMYK"), {}, None),
        ("ycc.tif", RGB.convert("YCbCr"), {}, None),
        ("alpha.png", RGBA, {}, TRANSPARENT),
        ("alpha.png", RGBA.convert("LA"), {}, TRANSPARENT),
        ("alpha.webp", RGBA, {"lossless": True}, TRANSPARENT),
        ("frames.gif", RGB, FRAMES, SEVERAL),
        ("frames.png", RGB, FRAMES, SEVERAL),
        ("frames.tiff", RGB, FRAMES, SEVERAL),
        ("frames.webp", RGB, FRAMES, SEVERAL),
        ("upright.jpg", RGB, {"exif": ROTATED}, TURNED),
        ("upright.png", RGB, {"exif": ROTATED}, TURNED),
        ("damaged-exif.jpg", RGB, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"}, None),
        ("UPPER.JPEG", RGB, {"format": "JPEG"}, None),
    ],
)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")
@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning")
def test_an_image_is_what_torchvision_makes_of_it(tmp_path, name, image, options, note):
    train = folders(tmp_path / "raw")
    image.save(train / "a" / name, **options)
    packed = pack("imagefolder", tmp_path / "raw", {}, tmp_path / "set.h5")
    images, labels, classes = by_torchvision(train)
    assert np.array_equal(packed.train.images, images)
    assert (packed.train.labels.tolist(), packed.classes) == (labels, classes)
    assert packed.notes == ({note: 1} if note else {})
    encoded = pack("imagefolder", tmp_path / "raw", ENCODED, tmp_path / "encoded.h5")
    for k, pixels in enumerate(images):
        assert np.array_equal(encoded.train.images._open(k, 1).transpose(2, 0, 1), pixels)
    assert encoded.notes == packed.notes


def test_sixteen_bit_colour_is_what_pillow_makes_of_it(tmp_path):
    values = RANDOM.integers(0, 65536, (6, 8, 3), dtype=np.uint16)
    (tmp_path / "a.ppm").write_bytes(b"P6 8 6 65535\n" + values.astype(">u2").tobytes())
    with Image.open(tmp_path / "a.ppm") as image:
        expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(decode(tmp_path / "a.ppm", None), expected)
    assert np.abs(expected.transpose(1, 2, 0) - values / 257).max() <= 1


@pytest.mark.parametrize(
    ("name", "image", "bits"),
    [
        ("a.png", GREY16, 16),
        ("a.tif", GREY16, 16),
        ("a.pgm", GREY16, "16|32"),
        ("a.tif", GREY.convert("I"), 32),
        ("a.tiff", GREY.convert("F"), 32),
    ],
)
@pytest.mark.parametrize("arguments", [{}, ENCODED])
def test_deep_grey_images_are_refused_instead_of_clipped(tmp_path, name, image, bits, arguments):
    folders(tmp_path / "raw")
    image.save(tmp_path / "raw" / "train" / "b" / name)
    message = f"train/b/{name}: pixels of ({bits}) bits .* clipped to white; convert the images"
    with pytest.raises(UsageError, match=message):
        pack("imagefolder", tmp_path / "raw", arguments, tmp_path / "set.h5")
    assert not (tmp_path / "set.h5").exists()


def test_other_damage_names_the_file(tmp_path):
    train = folders(tmp_path / "raw")
    (train / "b" / "1.png").write_bytes((train / "b" / "0.png").read_bytes()[:60])
    (train / "b" / "2.jpg").symlink_to(tmp_path / "gone.jpg")
    with pytest.raises(HpcAbsaError, match=r"train/b/1.png: unreadable image"):
        pack("imagefolder", tmp_path / "raw", {}, tmp_path / "set.h5")
    (train / "b" / "1.png").unlink()
    with pytest.raises(HpcAbsaError, match=r"train/b/2.jpg: unreadable image .*No such file"):
        pack("imagefolder", tmp_path / "raw", {}, tmp_path / "set.h5")


def test_orientation_and_transparency_are_noted_with_resizing_too(tmp_path):
    train = folders(tmp_path / "raw")
    RGB.resize((80, 60)).save(train / "a" / "1.jpg", exif=ROTATED)
    RGBA.resize((30, 30)).save(train / "a" / "2.png")
    packed = pack("imagefolder", tmp_path / "raw", {"image_size": 4}, tmp_path / "set.h5")
    assert packed.notes == {TURNED: 1, TRANSPARENT: 1}


# --- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["x.gif", "x.GIF", "x.jfif", "x.jpe", "x.jp2", "x.tga", "x.pcx", "x.dib", "x.pnm", "x.apng"],
)
def test_every_suffix_that_pillow_reads_is_an_image(tmp_path, name):
    train = folders(tmp_path / "raw")
    kinds = {".pnm": "PPM", ".apng": "PNG"}
    RGB.save(train / "b" / name, kinds.get(Path(name).suffix))
    packed = pack("imagefolder", tmp_path / "raw", {}, tmp_path / "set.h5")
    images, labels, _ = by_torchvision(train)
    assert np.array_equal(packed.train.images, images)
    assert packed.train.labels.tolist() == labels == [0, 1, 1]
    assert packed.notes == {}


def test_files_are_in_the_order_of_torchvision(tmp_path):
    names = [
        "b/2.png",
        "b/10.png",
        "a/y-x/1.png",
        "a/y/1.png",
        "a/z.png",
        "a/y/sub/1.png",
        "B/1.png",
    ]
    for part in ("train", "test"):
        for index, name in enumerate([*names, "é/ü.png", "日/a.png"]):
            path = tmp_path / "raw" / part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), (index, 0, 0)).save(path)
    packed = pack("imagefolder", tmp_path / "raw", {}, tmp_path / "set.h5")
    images, labels, classes = by_torchvision(tmp_path / "raw" / "train")
    assert np.array_equal(packed.train.images, images)
    assert (packed.train.labels.tolist(), packed.classes) == (labels, classes)


def strange_folder(root):
    train = folders(root)
    (train / "labels.csv").write_text("")
    RGB.save(train / "0.png")
    (train / ".ipynb_checkpoints").mkdir()
    RGB.save(train / ".ipynb_checkpoints" / "0.png")
    (train / "a" / "._0.png").write_bytes(b"\0\5\x16\7 of a Macintosh")
    (train / "a" / ".thumbnails").mkdir()
    RGB.save(train / "a" / ".thumbnails" / "0.png")
    for name in ("one.txt", "TWO.TXT", "Thumbs.db", "README", "scan.h5", "film.mpg"):
        (train / "b" / name).write_text("")
    (train / "b" / os.fsdecode(b"x.\xe9t\xe9")).write_text("")
    return root


STRANGE = {
    OUTSIDE: 2,
    HIDDEN: 3,
    "files left out, suffix .txt": 2,
    "files left out, suffix .db": 1,
    "files left out, suffix none": 1,
    "files left out, suffix .h5": 1,
    "files left out, suffix .mpg": 1,
    "files left out, suffix .été": 1,
}


def test_what_is_left_out_is_counted_printed_and_kept(tmp_path, capfd):
    strange_folder(tmp_path / "raw")
    packed = pack("imagefolder", tmp_path / "raw", {}, tmp_path / "set.h5")
    assert packed.notes == STRANGE
    assert (packed.classes, len(packed.train)) == (("a", "b"), 2)
    printed = capfd.readouterr()
    assert (printed.out, f"data: {HIDDEN}: 3\n" in printed.err) == ("", True)
    assert len(printed.err.splitlines()) == len(STRANGE)
    assert open_packed(packed.path).notes == STRANGE


def test_the_command_prints_and_shows_the_notes(tmp_path):
    strange_folder(tmp_path / "raw")
    arguments = ["data", "imagefolder", "--root", str(tmp_path / "raw")]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, "data: files left out, suffix .txt: 2" in result.output) == (0, True)
    shown = CliRunner().invoke(app, ["data", "--show", str(tmp_path / "raw.h5")])
    assert json.loads(shown.output)["notes"] == STRANGE


def test_the_command_prints_all_keys_that_the_job_needs(tmp_path):
    """A job without these arguments would be refused: they are those of the packed file."""
    folders(tmp_path / "raw")
    arguments = ["data", "imagefolder", "--root", str(tmp_path / "raw"), "--image-size", "4"]
    result = CliRunner().invoke(app, [*arguments, "--encoded"])
    keys = f"root = '{tmp_path}/raw.h5', image_size = 4, encoded = true"
    assert (result.exit_code, keys in result.output) == (0, True)


def test_notes_that_cannot_be_printed_do_not_fail(tmp_path, monkeypatch):
    strange_folder(tmp_path / "raw")
    full = SimpleNamespace(write=Mock(side_effect=OSError(28, "No space left on device")))
    monkeypatch.setattr("sys.stderr", full)
    assert pack("imagefolder", tmp_path / "raw", {}, tmp_path / "set.h5").notes == STRANGE
    assert full.write.called


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    train = folders(tmp_path / "raw")
    (train / "a" / "more").mkdir()
    scandir = os.scandir

    def denied(path):  # permissions do not hold for root
        if str(path).endswith("more"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", denied)
    with pytest.raises(UsageError, match=r"data.root: .*/train/a/more: Permission denied"):
        load("imagefolder", tmp_path / "raw", {})


# --- names ------------------------------------------------------------------------------------


def test_names_in_latin_1_are_decoded(tmp_path):
    train = folders(tmp_path / "raw", [b"caf\xe9", "thé", b"z\xff\xfe"])
    RGB.save(train / "thé" / os.fsdecode(b"b\xe9b\xe9.png"))
    packed = pack("imagefolder", tmp_path / "raw", {}, tmp_path / "set.h5")
    assert packed.classes == ("café", "thé", "zÿþ")
    assert packed.train.labels.tolist() == [0, 1, 1, 2]
    check_content(packed)


def test_errors_about_undecodable_names_can_be_printed(tmp_path):
    train = folders(tmp_path / "raw")
    (train / "b" / os.fsdecode(b"\xe9t\xe9.png")).write_text("")
    with pytest.raises(HpcAbsaError, match=r"train/b/été.png: unreadable image"):
        pack("imagefolder", tmp_path / "raw", {}, tmp_path / "set.h5")


def test_a_root_that_cannot_be_decoded(tmp_path):
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folders(root)
    command = [sys.executable, "-m", "hpc_absa", "data", "imagefolder", "--root", os.fsencode(root)]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    ended = subprocess.run(command, capture_output=True, env=environment, timeout=120, check=False)
    assert (ended.returncode, "packed: " in ended.stdout.decode()) == (0, True), ended.stderr
    assert "café.h5; in the job" in ended.stdout.decode()


def test_the_names_of_classes_do_not_depend_on_the_locale(tmp_path):
    folders(tmp_path / "raw", ["thé"])
    program = (
        "import sys; from pathlib import Path; from hpc_absa.data.sources import load;"
        "print(ascii(load('imagefolder', Path(sys.argv[1]), {}).classes))"
    )
    # PYTHONUTF8=0 with the C locale makes names ASCII with escapes.
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", program, str(tmp_path / "raw")]
    ended = subprocess.run(command, capture_output=True, env=environment, timeout=120, check=False)
    assert ended.stdout.decode().strip() == ascii(("thé",)), ended.stderr


@pytest.mark.parametrize("option", ["--root", "--out", "--show"])
def test_an_empty_option_is_refused(tmp_path, monkeypatch, option):
    # As of a shell variable that is not set: `--root "$DATA"`.
    folders(tmp_path / "raw")
    monkeypatch.chdir(tmp_path / "raw")
    command = [sys.executable, "-m", "hpc_absa", "data", "imagefolder", "--root", ".", option, ""]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2, ended.stderr
    assert not list(tmp_path.glob("*.h5"))
