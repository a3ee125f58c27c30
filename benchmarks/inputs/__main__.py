"""Images per second of packing and of training input: `python -m benchmarks.inputs [--quick]`.

A tree of JPEG files is drawn (`--images`, 100 to 500 pixels, ten classes) beside `--folder`, or
used again if it is there. Training input is measured in turns, one epoch each: torchvision's
ImageFolder and DataLoader with RandomResizedCrop, flip, ToTensor and Normalize, in as many
processes as there are cores; ours from packed JPEG, with the same transforms; ours from decoded
pixels of the same size, with padded crops and flips. Then a ResNet-18 (or `--model`) is trained
from packed JPEG, and the share of the time that it waits for data is measured.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from benchmarks import results
from benchmarks.results import Comparison, Measure, Numbers
from hpc_absa import models
from hpc_absa.data.arrays import PackedReader
from hpc_absa.data.loader import Loader
from hpc_absa.data.packed import PackedDataset
from hpc_absa.data.prepare import pack
from hpc_absa.progress import SampleStream
from hpc_absa.torchvision_import import torchvision

BATCH, SIZE = 64, 224
PEER, JPEG, PIXELS = "ImageFolder and DataLoader", "packed JPEG", "packed pixels"
CORES = len(os.sched_getaffinity(0))


def draw(folder: Path, images: int, distinct: int) -> None:
    """Smooth images with some noise, of about the bytes per pixel of photographs.

    Those after the first `distinct` are hard links to these.
    """
    drawn: list[Path] = []
    random = np.random.default_rng(0)
    for k in range(images):
        part = "val" if k % 20 == 0 else "train"
        path = folder / part / f"class{k // 20 % 10}" / f"{k:06d}.jpg"
        if k < distinct:
            drawn.append(path)
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if k >= distinct:
            path.hardlink_to(drawn[k % distinct])
            continue
        width, height = random.integers(100, 501, 2)
        coarse = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        noise = random.normal(0, 6, (height, width, 1))
        pixels = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path, quality=85)


def theirs(folder: Path) -> Callable[[], int]:
    transforms = torchvision().transforms
    dataset = torchvision().datasets.ImageFolder(
        folder / "train",
        transforms.Compose(
            [
                transforms.RandomResizedCrop(SIZE),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        ),
    )
    loader = torch.utils.data.DataLoader(
        dataset, BATCH, shuffle=True, num_workers=CORES, persistent_workers=True
    )
    return lambda: sum(len(inputs) for inputs, _ in loader)


def rate_of(epoch: Callable[[], int]) -> Numbers:
    begin, used = time.perf_counter(), cpu_seconds()
    images = epoch()
    return {
        "speed": images / (time.perf_counter() - begin),
        "CPU time": 1000 * (cpu_seconds() - used) / images,
    }


def cpu_seconds() -> float:
    """Of this process and of the DataLoader's."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def loader_of(dataset: PackedDataset) -> Loader:
    stream = SampleStream(len(dataset.train), BATCH, 10**6, every=len(dataset.train))
    padding = 0 if dataset.is_encoded else SIZE // 8
    reader = PackedReader(dataset, 0, padding=padding, flip=True, device=torch.device("cpu"))
    return Loader(dataset, reader, stream, 0)


def ours(dataset: PackedDataset) -> Callable[[], int]:
    loader, steps, place = loader_of(dataset), len(dataset.train) // BATCH, [0]

    def epoch() -> int:
        count = 0
        for k in range(place[0], place[0] + steps):
            count += len(loader.get(k, then=range(k + 1, k + 1 + loader.ahead)).inputs)
        place[0] += steps
        return count

    return epoch


def packing(folder: Path, out: Path, encoded: bool) -> tuple[PackedDataset, float]:
    began = time.perf_counter()
    arguments = {"image_size": SIZE} | ({"encoded": True} if encoded else {})
    dataset = pack("imagefolder", folder, arguments, out)
    return dataset, (len(dataset.train) + len(dataset.test)) / (time.perf_counter() - began)


def train(dataset: PackedDataset, name: str, steps: int) -> float:
    """Share of the time of training steps in which the next batch is not there."""
    loader = loader_of(dataset)
    model = models.build(name, {}, **dataset.offered)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    waited, began = 0.0, 0.0
    for k in range(steps + 1):
        if k == 1:
            waited, began = 0.0, time.perf_counter()
        before = time.perf_counter()
        batch = loader.get(k, then=range(k + 1, k + 1 + loader.ahead))
        waited += time.perf_counter() - before
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(batch.inputs), batch.targets).backward()
        optimizer.step()
    return waited / (time.perf_counter() - began)


def main() -> None:
    parser = results.options(__doc__)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--distinct", type=int, default=4_000, help="the others are hard links")
    parser.add_argument("--folder", type=Path, default=Path("data/drawn"))
    parser.add_argument("--model", default="resnet18")
    options = parser.parse_args()
    images, rounds = (600, 2) if options.quick else (options.images, options.rounds)
    folder = options.folder.with_name(f"{options.folder.name}-{images}")
    torch.set_num_threads(1)
    draw(folder, images, options.distinct)
    prepared = Comparison(
        "Packing, and the first batch",
        {"packing": Measure("images/s"), "first batch": Measure("s")},
        PEER,
    )
    measures = {
        "speed": Measure("images/s", "higher"),
        "CPU time": Measure("ms an image", "lower"),
    }
    table = Comparison("Training input", measures, JPEG)
    table.not_peers = (PIXELS,)
    distinct = f"{images:,} images, {min(images, options.distinct):,} of them distinct"
    table.note = f"{distinct}; {PIXELS}: padded crops of decoded images of 224 pixels."
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        encoded, rate = packing(folder, Path(temporary, "encoded.h5"), encoded=True)
        begin = time.perf_counter()
        loader_of(encoded).get(0)
        prepared.add(JPEG, {"packing": rate, "first batch": time.perf_counter() - begin})
        decoded, rate = packing(folder, Path(temporary, "pixels.h5"), encoded=False)
        prepared.add(PIXELS, {"packing": rate})
        epochs = {PEER: theirs(folder), JPEG: ours(encoded), PIXELS: ours(decoded)}
        table.run({name: partial(rate_of, epoch) for name, epoch in epochs.items()}, rounds)
        torch.set_num_threads(CORES)
        waiting = Comparison(
            f"Training {options.model} on {JPEG}, batch {BATCH}",
            {"waiting for data": Measure("%")},
            "",
        )
        share = train(encoded, options.model, 3 if options.quick else 30)
        waiting.add(JPEG, {"waiting for data": 100 * share})
    results.write("inputs", [prepared, table, waiting], options)


if __name__ == "__main__":
    main()
