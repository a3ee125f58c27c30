"""Packed files with encoded images: what torchvision gives, packing, resuming, damaged files."""

import errno
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from hpc_absa import config
from hpc_absa.comm import SerialCommunicator
from hpc_absa.data import checking, encoded_packing
from hpc_absa.data.arrays import PackedReader
from hpc_absa.data.augment import normalise
from hpc_absa.data.encoded import decode, pixels_of
from hpc_absa.data.encoded_packing import EncodedSource, pack_encoded
from hpc_absa.data.loader import Loader
from hpc_absa.data.packed import open_packed
from hpc_absa.data.prepare import describe, pack
from hpc_absa.data.resized_crop import random_boxes
from hpc_absa.data.subset import subset
from hpc_absa.errors import CollectiveError, HpcAbsaError, UsageError
from hpc_absa.progress import SampleStream
from hpc_absa.rundir import RunDir
from hpc_absa.torchvision_import import torchvision
from hpc_absa.training.clock import Clock
from hpc_absa.training.setup import build_trainer
from tests.training import runs

S = 32


def picture(width, height, seed=0):
    """A smooth image with noise, which a JPEG keeps well."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noise = random.integers(-8, 9, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def draw_images(folder):
    """Two classes of images of different sizes and formats; returns the folder."""
    sizes = [(40, 50), (64, 48), (33, 90), (100, 37), (200, 160), (70, 70), (31, 45), (500, 400)]
    for part, count in (("train", 8), ("val", 3)):
        for k in range(2 * count):
            parent = folder / part / "ab"[k % 2]
            parent.mkdir(parents=True, exist_ok=True)
            image = picture(*sizes[k % len(sizes)], seed=k)
            if k % 5 == 1:
                image = image.convert("L")
            if k % 5 == 2:
                image = image.convert("CMYK")
            if k % 5 == 3:
                image.convert("P").save(parent / f"{k:02d}.png")
            else:
                image.save(parent / f"{k:02d}.jpg", quality=90)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return draw_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def dataset(root, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "set.h5"
    return pack("imagefolder", root, {"image_size": S, "encoded": True}, path)


# Against torchvision


def folder_of(root, part, transform):
    return torchvision().datasets.ImageFolder(root / part, transform)


def test_centre_crops_are_those_of_torchvision(dataset, root):
    transforms = torchvision().transforms
    short = round(S * 256 / 224)
    theirs = transforms.Compose(
        [transforms.Resize(short), transforms.CenterCrop(S), transforms.PILToTensor()]
    )
    folder = folder_of(root, "val", theirs)
    ours = dataset.test.images[np.arange(len(folder))]
    for k, (pixels, label) in enumerate(folder):
        assert dataset.test.labels[k] == label
        difference = np.abs(ours[k].astype(int) - pixels.numpy().astype(int))
        # A JPEG of twice the size or more is decoded at a smaller scale.
        large = min(Image.open(folder.samples[k][0]).size) >= 2 * short
        assert difference.max() <= (24 if large else 2)
        assert difference.mean() < (2 if large else 0.25)


def test_random_crops_are_those_of_torchvision_for_the_same_boxes(dataset, root):
    """Of its tensors exactly, and of its Pillow images up to rounding."""
    torchvision()  # so that it can be imported
    functional = importlib.import_module("torchvision.transforms.v2.functional")
    samples = np.arange(len(dataset.train))
    epochs = np.full(len(samples), 3)
    ours = dataset.train.images.random_crops(samples, 7, epochs, flip=True)
    images = [image for image, _ in folder_of(root, "train", None)]
    widths, heights = (np.array([image.size[k] for image in images]) for k in (0, 1))
    boxes, mirrored = random_boxes(7, epochs, samples, widths, heights)
    exact = 0
    for k, image in enumerate(images):
        left, top, width, height = boxes[k].tolist()
        for kind, largest, mean in (("tensor", 0, 0), ("pil", 2, 0.25)):
            theirs = functional.pil_to_tensor(image) if kind == "tensor" else image
            theirs = functional.resized_crop(
                theirs, top, left, height, width, [S, S], antialias=True
            )
            theirs = functional.hflip(theirs) if mirrored[k] else theirs
            theirs = theirs if kind == "tensor" else functional.pil_to_tensor(theirs)
            difference = np.abs(ours[k].astype(int) - theirs.numpy().astype(int))
            if width < 2 * S or height < 2 * S:
                assert difference.max() <= largest
                assert difference.mean() <= mean
                exact += 1
            assert difference.mean() < 2.5
    assert exact >= 20
    assert 0 < mirrored.sum() < len(samples)


def test_boxes_have_the_distribution_of_torchvision():
    """Area, ratio, position and share of fallbacks, of three sizes."""
    transform = torchvision().transforms.RandomResizedCrop(224)
    n = 4000
    torch.manual_seed(0)
    for width, height in ((500, 375), (120, 400), (640, 100)):
        image = Image.new("L", (width, height))
        theirs = [transform.get_params(image, transform.scale, transform.ratio) for _ in range(n)]
        top, left, h, w = np.array(theirs).T
        ours, _ = random_boxes(
            1, np.zeros(n, np.int64), np.arange(n), np.full(n, width), np.full(n, height)
        )
        for mine, other in zip(ours.T, (left, top, w, h), strict=True):
            assert ks(mine, other) < 1.95 * np.sqrt(2 / n)  # a level of 0.001
        assert ks(ours[:, 2] * ours[:, 3], w * h) < 1.95 * np.sqrt(2 / n)
        assert ks(ours[:, 2] / ours[:, 3], w / h) < 1.95 * np.sqrt(2 / n)
        assert (ours[:, 0] + ours[:, 2] <= width).all()
        assert (ours[:, 1] + ours[:, 3] <= height).all()


def ks(one, other):
    """Distance of two empirical distributions."""
    values = np.sort(np.concatenate([one, other]))
    cdfs = [np.searchsorted(np.sort(x), values, side="right") / len(x) for x in (one, other)]
    return np.abs(cdfs[0] - cdfs[1]).max()


# Order and augmentation


def loader(dataset, b=5, seed=3):
    stream = SampleStream(len(dataset.train), b, epochs=9, every=len(dataset.train))
    reader = PackedReader(dataset, seed, padding=4, flip=True, device=torch.device("cpu"))
    return Loader(dataset, reader, stream, seed)


def test_a_sample_is_the_same_in_any_batch_and_differs_between_epochs(dataset):
    whole, parts = loader(dataset, b=16), loader(dataset, b=4)
    batch = whole.get(0)
    pieces = torch.cat([parts.get(k).inputs for k in range(4)])
    assert torch.equal(batch.inputs, pieces)
    assert batch.inputs.shape == (16, 3, S, S)
    again = whole.get(1)
    same = [(batch.samples == s).argmax() for s in again.samples]
    assert not any(torch.equal(a, batch.inputs[k]) for a, k in zip(again.inputs, same, strict=True))


@pytest.mark.parametrize("encoded", [True, False])
def test_the_memory_of_a_batch_is_used_again_when_it_is_gone(dataset, encoded, root, tmp_path):
    if not encoded:
        dataset = pack("imagefolder", root, {"image_size": S}, tmp_path / "pixels.h5")
    reader = loader(dataset).reader
    read = partial(reader.read, "train", np.arange(4))
    first = read(np.zeros(4, int)).inputs
    kept, place = first.clone(), first.data_ptr()
    row = first.numpy()[1]
    del first
    second = read(np.ones(4, int)).inputs
    assert second.data_ptr() != place, "a view of the first batch is in use"
    assert torch.equal(torch.from_numpy(row), kept[1])
    del row
    assert read(np.zeros(4, int)).inputs.data_ptr() == place


@pytest.mark.parametrize("channels_last", [False, True])
def test_inputs_are_the_normalised_crops(dataset, channels_last):
    reader = PackedReader(
        dataset, 3, padding=0, flip=True, device=torch.device("cpu"), channels_last=channels_last
    )
    samples, epochs = np.arange(16), np.zeros(16, np.int64)
    pixels = dataset.train.images.random_crops(samples, 3, epochs, flip=True)
    mean, std = torch.tensor(dataset.mean), torch.tensor(dataset.std)
    inputs = reader.read("train", samples, epochs).inputs
    assert torch.equal(inputs, normalise(torch.from_numpy(pixels), mean, std))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert inputs.is_contiguous(memory_format=layout)


def test_a_loader_that_starts_in_mid_epoch_gives_the_same(dataset):
    straight, resumed = loader(dataset), loader(dataset)
    batches = [straight.get(k, then=[k + 1]) for k in range(7)]
    assert torch.equal(resumed.get(6).inputs, batches[6].inputs)


JOB = """
name = "encoded"
data = { name = "imagefolder", image_size = 32, encoded = true }
model = { name = "tests.data.test_encoded:net" }
schedule = { method = "abs", base_batch = 4, max_batch = 8, kappa = 2 }
hessian = { samples = 8, tol = 0.1 }
ranks = { max = 1 }
checkpoint = { async = false }
[train]
epochs = 3
microbatch = 4
lr = 0.01
threads_per_rank = 1
metrics = ["accuracy", "top5"]
"""


def train(root, folder, *overrides, stop_after=None, comm=None):
    """A run of the job, stopped and continued once after so many steps."""
    threads = torch.get_num_threads()
    job = config.parse(JOB, "test", (f"data.root={root}", *overrides))
    for steps in [stop_after, None] if stop_after else [None]:
        stop, built = runs.Stop(), None
        built = build_trainer(
            job, RunDir(folder).create(), comm or SerialCommunicator(), Clock(), stop,
            io.StringIO(), (),
        )  # fmt: skip
        end_step = built.run.end_step

        def counted(step, result, end_step=end_step, stop=stop, built=built, steps=steps):
            end_step(step, result)
            stop.now = built.run.state.progress.position.step == steps

        built.run.end_step = counted
        built.train()
    torch.set_num_threads(threads)
    return built, runs.events(folder, "epoch", "decision")


def net(classes):
    return torch.nn.Sequential(
        torch.nn.AvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(48, classes)
    )


def test_training_with_a_stop_in_mid_epoch_gives_the_same_bits(root, tmp_path, monkeypatch):
    whole, events = train(root, tmp_path / "whole")
    parts, again = train(root, tmp_path / "parts", stop_after=5)
    assert runs.state_bits(whole.run.state) == runs.state_bits(parts.run.state)
    epochs, continued = ([e for e in e2 if e["event"] == "epoch"] for e2 in (events, again))
    assert continued == epochs
    assert epochs[-1]["metrics"]["top5"] == 1.0
    resumed = [e["step"] for e in runs.events(tmp_path / "parts", "phase_start")]
    assert resumed[1] == 6, "two steps after the first epoch, of four"


def test_padding_is_refused(root, tmp_path):
    job = config.parse(JOB, "test", (f"data.root={root}", "data.padding=4"))
    with pytest.raises(CollectiveError, match=r"data\.padding = 4: expected none with encoded"):
        build_trainer(
            job, RunDir(tmp_path).create(), SerialCommunicator(), Clock(), runs.Stop(),
            io.StringIO(), (),
        )  # fmt: skip


def test_part_of_the_training_set(dataset):
    part = subset(dataset, "train", 5)
    assert len(part.train) == len(part.train.images) == 5
    assert part.train.images.shape == (5, 3, S, S)
    chosen = [
        k for k in range(16) if any((dataset.train.images[np.array([k])] == x).all()
                                    for x in part.train.images[np.arange(5)])
    ]  # fmt: skip
    assert len(chosen) == 5


def test_what_the_file_says(dataset):
    described = describe(dataset.path)
    assert (described["train"], described["test"], described["shape"]) == (16, 6, [3, S, S])
    assert (described["format_version"], described["dtype"]) == (2, "uint8")
    crops = dataset.train.images[np.arange(16)]
    assert dataset.mean == pytest.approx(crops.mean(axis=(0, 2, 3)) / 255)
    assert dataset.std == pytest.approx((crops / 255).std(axis=(0, 2, 3)))
    assert dataset.is_image


# Packing


def files_of(root, count=None):
    files = sorted((root / "train").rglob("*.*"))[:count]
    return files, [k % 2 for k in range(len(files))]


def source(root, **keys):
    return EncodedSource(files_of(root), files_of(root, 4), ("a", "b"), S, **keys)


def test_a_packing_that_was_stopped_is_continued(root, tmp_path, monkeypatch):
    monkeypatch.setattr(encoded_packing, "BLOCK", 3)
    whole = pack_encoded(tmp_path / "whole.h5", source(root), "x", {})
    packed = []

    def stop(done, total):
        packed.append(done)
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_encoded(tmp_path / "parts.h5", source(root), "x", {}, stop)
    assert not (tmp_path / "parts.h5").exists()
    reads = []
    original = checking._check
    monkeypatch.setattr(
        checking, "_check", lambda file, size: reads.append(file) or original(file, size)
    )
    parts = pack_encoded(tmp_path / "parts.h5", source(root), "x", {})
    assert len(reads) == 20 - 9
    assert parts.digest == whole.digest
    assert (parts.train.images[np.arange(16)] == whole.train.images[np.arange(16)]).all()
    assert {file.name for file in tmp_path.iterdir()} == {"whole.h5", "parts.h5"}


def test_a_journal_that_was_cut_short_is_continued(root, tmp_path, monkeypatch):
    monkeypatch.setattr(encoded_packing, "BLOCK", 3)
    journal = tmp_path / ".set.h5.partial.jsonl"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            pack_encoded(tmp_path / "set.h5", source(root), "x", {}, interrupt)
        with journal.open("a") as file:
            file.write('{"part": "tr')
    assert len(journal.read_text().splitlines()) == 4
    packed = pack_encoded(tmp_path / "set.h5", source(root), "x", {})
    assert packed.digest == pack_encoded(tmp_path / "whole.h5", source(root), "x", {}).digest


def test_files_that_did_not_reach_the_disk_are_packed_again(root, tmp_path, monkeypatch):
    """The system reports a lost write once: the next fsync succeeds."""
    monkeypatch.setattr(encoded_packing, "BLOCK", 3)
    monkeypatch.setattr(encoded_packing, "SYNC_BLOCKS", 2)
    monkeypatch.setattr(os, "fsync", Mock(side_effect=[OSError(errno.EDQUOT, "quota"), None]))
    with pytest.raises(HpcAbsaError, match=r"cannot be written \(.*quota"):
        pack_encoded(tmp_path / "set.h5", source(root), "x", {})
    assert len((tmp_path / ".set.h5.partial.jsonl").read_text().splitlines()) == 1


def test_an_error_of_the_machine_does_not_leave_files_out(root, tmp_path, monkeypatch):
    def fail(path):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(UsageError, match="Too many open files, on "):
        pack_encoded(tmp_path / "set.h5", source(root, skip_unreadable=True), "x", {})


def test_a_second_packing_at_the_same_time_is_refused(root, tmp_path):
    path, messages = tmp_path / "set.h5", []

    def second(done, total):
        if not messages:
            with pytest.raises(UsageError, match="another process is packing it") as caught:
                pack_encoded(path, source(root), "x", {})
            messages.append(str(caught.value))

    assert len(pack_encoded(path, source(root), "x", {}, second).train) == 16
    assert "wait for it or end it" in messages[0]


def test_other_files_start_again(root, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        pack_encoded(tmp_path / "set.h5", source(root), "x", {}, interrupt)
    other = EncodedSource(files_of(root, 7), files_of(root, 4), ("a", "b"), S)
    assert len(pack_encoded(tmp_path / "set.h5", other, "x", {}).train) == 7


def test_a_partial_file_that_hdf5_refuses_is_packed_again(root, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        pack_encoded(tmp_path / "set.h5", source(root), "x", {}, interrupt)
    with (tmp_path / ".set.h5.partial").open("r+b") as file:
        file.write(bytes(64))
    assert len(pack_encoded(tmp_path / "set.h5", source(root), "x", {}).train) == 16


def interrupt(done, total):
    raise KeyboardInterrupt


@pytest.fixture
def damaged(root, tmp_path):
    """A copy of the folder with a truncated file, one that is no image, and one of 16 bits."""
    folder = tmp_path / "images"
    for file in (f for f in root.rglob("*") if f.is_file()):
        copy = folder / file.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    first = folder / "train" / "a" / "00.jpg"
    first.write_bytes(first.read_bytes()[:700])
    (folder / "train" / "a" / "text.jpg").write_text("no image")
    deep = Image.fromarray(np.full((40, 40), 40000, np.uint16))
    deep.save(folder / "train" / "b" / "deep.png")
    return folder


def test_an_unreadable_file_stops_the_packing_and_is_named(damaged, tmp_path):
    with pytest.raises(UsageError, match=r"00\.jpg: unreadable image .* data\.unreadable = 'skip'"):
        pack("imagefolder", damaged, {"image_size": S, "encoded": True}, tmp_path / "set.h5")
    assert not (tmp_path / "set.h5").exists()


def test_unreadable_files_are_left_out_and_listed(damaged, tmp_path):
    arguments = {"image_size": S, "encoded": True, "unreadable": "skip"}
    packed = pack("imagefolder", damaged, arguments, tmp_path / "set.h5")
    assert len(packed.train) == 15
    assert packed.notes["unreadable images, left out"] == 3
    lines = (tmp_path / "set.h5.unreadable.txt").read_text().splitlines()
    assert [line.split(": ")[0].rpartition("/")[2] for line in lines] == [
        "00.jpg", "text.jpg", "deep.png"
    ]  # fmt: skip
    assert "16 bits" in lines[2]
    assert packed.train.images[np.arange(15)].shape == (15, 3, S, S)


def test_a_link_to_nothing_is_unreadable(root, tmp_path):
    (tmp_path / "link.jpg").symlink_to(tmp_path / "nothing")
    files = EncodedSource(
        ([tmp_path / "link.jpg", *files_of(root, 3)[0]], [0, 0, 1, 0]), files_of(root, 4),
        ("a", "b"), S, skip_unreadable=True,
    )  # fmt: skip
    assert len(pack_encoded(tmp_path / "set.h5", files, "x", {}).train) == 3
    manifest = (tmp_path / "set.h5.unreadable.txt").read_text()
    assert manifest.endswith("link.jpg: unreadable file (No such file or directory)\n")


def test_a_file_that_changes_while_it_is_packed_ends_the_packing(root, tmp_path, monkeypatch):
    """It would be written over the one after it."""
    size = encoded_packing._size
    monkeypatch.setattr(encoded_packing, "_size", lambda file: size(file) - 1)
    with pytest.raises(UsageError, match=r"\.jpg: has \d+ bytes, and had \d+ when the files"):
        pack_encoded(tmp_path / "set.h5", source(root, skip_unreadable=True), "x", {})
    monkeypatch.setattr(encoded_packing, "_size", size)
    monkeypatch.setattr(Path, "read_bytes", Mock(side_effect=FileNotFoundError(2, "gone")))
    with pytest.raises(UsageError, match=r"\.jpg: gone since the files were listed, or not on"):
        pack_encoded(tmp_path / "set.h5", source(root, skip_unreadable=True), "x", {})


@pytest.mark.parametrize(("count", "limit"), [(3, 10**9), (100, 5000)])
def test_blocks_are_limited_by_files_and_bytes(root, monkeypatch, count, limit):
    monkeypatch.setattr(encoded_packing, "BLOCK", count)
    monkeypatch.setattr(encoded_packing, "BLOCK_BYTES", limit)
    part = encoded_packing._Part("train", *files_of(root))
    part.done[[0, 5, 6]] = True
    blocks = part.blocks()
    assert [k for block in blocks for k in block] == [1, 2, 3, 4, *range(7, 16)]
    assert len(blocks) > 3
    for block in blocks:
        assert len(block) <= count
        assert part.lengths[block[:-1]].sum() < limit


def test_an_index_of_imagenets_size(dataset, tmp_path):
    """1.28 million images: the first batch takes seconds, and the memory is that of an order."""
    path, count = tmp_path / "large.h5", 1_281_167
    shutil.copy(dataset.path, path)
    with h5py.File(path, "r+") as file:
        for key in ("starts", "lengths", "sizes", "labels"):
            values = file[f"train/{key}"][()]
            del file[f"train/{key}"]
            file[f"train/{key}"] = np.resize(values, (count, *values.shape[1:]))
    program = (
        "import resource, sys, time; from pathlib import Path; import numpy as np\n"
        "from hpc_absa.data.packed import open_packed\n"
        "from tests.data.test_encoded import loader\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "loader(open_packed(Path(sys.argv[1]))).get(0)\n"
        "before, begin = peak(), time.perf_counter()\n"
        "large = loader(open_packed(Path(sys.argv[2])))\n"
        "large.get(0); large.get(len(large.dataset.train) // 5)\n"
        "print(peak() - before, time.perf_counter() - begin)"
    )
    command = [sys.executable, "-c", program, str(dataset.path), str(path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    megabytes, seconds = map(float, ended.stdout.split())
    assert megabytes < 250, "two orders of 10 MB, what makes them, and the pages of the index"
    assert seconds < 30


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"encoded": True}, "data.image_size: missing"),
        ({"image_size": S, "unreadable": "skip"}, "expected encoded = true"),
        ({"image_size": S, "encoded": True, "unreadable": "no"}, "expected 'stop' or 'skip'"),
    ],
)
def test_wrong_arguments(root, tmp_path, arguments, line):
    with pytest.raises(UsageError, match=line):
        pack("imagefolder", root, arguments, tmp_path / "set.h5")


def test_kinds_of_images_are_those_of_convert_rgb():
    """EXIF orientation is not applied, CMYK and palettes become RGB: as in ImageFolder."""
    for mode in ("L", "P", "CMYK", "1", "LA", "RGBA"):
        image = picture(20, 30).convert("RGB").convert(mode)
        out = io.BytesIO()
        image.save(out, "TIFF")
        expected = np.asarray(Image.open(io.BytesIO(out.getvalue())).convert("RGB"))
        assert (np.asarray(decode(out.getvalue(), "x")) == expected).all()
    rotated = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(20, 30).save(rotated, "JPEG", exif=exif)
    assert decode(rotated.getvalue(), "x").size == (20, 30)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("keys", [{"subsampling": k} for k in range(3)] + [{"progressive": True}])
def test_jpeg_has_the_pixels_of_pillow(mode, keys):
    """At every scale, also of odd sizes."""
    for width, height in ((97, 61), (240, 135)):
        out = io.BytesIO()
        picture(width, height).convert(mode).save(out, "JPEG", quality=80, **keys)
        for reduction in (1, 2, 4, 8):
            data = np.frombuffer(out.getvalue(), np.uint8)  # read-only, as a mapped file
            expected = np.asarray(decode(data, "x", reduction))
            assert expected.shape == (-(-height // reduction), -(-width // reduction), 3)
            assert np.array_equal(pixels_of(data, "x", reduction), expected)


def test_a_truncated_jpeg_in_a_packed_file_is_named():
    out = io.BytesIO()
    picture(97, 61).save(out, "JPEG")
    with pytest.raises(HpcAbsaError, match="set: image 3: unreadable image"):
        pixels_of(np.frombuffer(out.getvalue()[:900], np.uint8), "set: image 3")


def test_a_huge_image_is_refused_by_name(root, tmp_path, monkeypatch):
    """Pillow's limit, which protects against files that decode to more than the memory."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 70_000)
    with pytest.raises(UsageError, match=r"\.jpg: unreadable image \(Image size .* exceeds limit"):
        pack("imagefolder", root, {"image_size": S, "encoded": True}, tmp_path / "set.h5")


def test_a_damaged_packed_file_is_refused(dataset, tmp_path):
    path = tmp_path / "cut.h5"
    data = dataset.path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(HpcAbsaError, match="damaged"):
        open_packed(path)


def test_the_journal_has_a_line_for_each_block(root, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        pack_encoded(tmp_path / "set.h5", source(root), "x", {}, interrupt)
    first, second = (tmp_path / ".set.h5.partial.jsonl").read_text().splitlines()
    assert set(json.loads(first)) == {"version", "files"}
    assert json.loads(second)["part"] == "train"
