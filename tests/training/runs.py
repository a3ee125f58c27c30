"""A small job on synthetic images, trained in this process on one rank."""

import io
import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from hpc_absa import config
from hpc_absa.comm import SerialCommunicator
from hpc_absa.data.sources import Source
from hpc_absa.records import PhaseOutcome
from hpc_absa.rundir import RunDir
from hpc_absa.training.clock import Clock
from hpc_absa.training.setup import build_trainer
from hpc_absa.training.trainer import Trainer

SAMPLES, EPOCHS, MICROBATCH = 148, 4, 8
JOB = f"""
name = "small"
[data]
name = "tests.training.runs:images"
padding = 1
flip = true
[model]
name = "digits-cnn"
width = 2
[train]
epochs = {EPOCHS}
microbatch = {MICROBATCH}
lr = 0.02
weight_decay = 1e-3
threads_per_rank = 1
[schedule]
method = "absa"
base_batch = 16
max_batch = 64
kappa = 1
[hessian]
samples = 32
tol = 0.1
[ranks]
max = 1
[checkpoint]
async = false
"""
"""The batch is 16, 32 and 64 in the first three epochs, which end in microbatches 18, 36 and 55 of
the stream. Both growths cut the step that contains the end of the epoch: steps of 2 microbatches
begin at 0, 2, ..., 18, steps of 4 at 19, 23, ..., 35, and steps of 8 at 37, 45, 53 and 61."""

VOLATILE = ("time", "seconds", "samples_per_second", "bytes")
"""Fields of events that differ between two equal runs."""


def images() -> Source:
    """The training and test set."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, SAMPLES + 50)
    pixels = random.integers(0, 128, (len(labels), 1, 8, 8)) + 30 * labels[:, None, None, None]
    pixels = pixels.astype(np.uint8)
    train, test = slice(SAMPLES), slice(SAMPLES, None)
    return Source.from_arrays(
        pixels[train], labels[train], pixels[test], labels[test], classes=list("abcd")
    )


class Stop:
    """A stop request that the test makes by setting `now`, or during the first estimate."""

    def __init__(self, *, during_estimate: bool = False) -> None:
        self.now, self.during_estimate = False, during_estimate

    def requested_here(self):
        return self.now

    def requested(self):
        self.now |= self.during_estimate
        return self.now

    def count_progress(self, items):
        return items

    def saving(self):
        return nullcontext()


def train_until(folder: Path, *overrides: str, microbatch: int) -> None:
    """Train the job with a stop that is requested when it loads a microbatch."""
    stop = Stop()
    stopping = trainer(folder, *overrides, stop=stop)
    get = stopping.loader.get

    def get_and_stop(k, then=()):
        stop.now |= k == microbatch
        return get(k, then)

    stopping.loader.get = get_and_stop
    assert stopping.train().kind == "stopped"


def trainer(
    folder: Path, *overrides: str, stop: Stop | None = None, allow_changed: tuple[str, ...] = ()
) -> Trainer:
    """The job's trainer, at the newest checkpoint in `folder`."""
    job = config.parse(JOB, "test", overrides)
    return build_trainer(
        job,
        RunDir(folder).create(),
        SerialCommunicator(),
        Clock(),
        stop or Stop(),
        io.StringIO(),
        allow_changed,
    )


def train(folder: Path, *overrides: str) -> PhaseOutcome:
    return trainer(folder, *overrides).train()


def events(folder: Path, *kinds: str) -> list[dict]:
    """Events of these kinds, or all, without what differs between two equal runs.

    `progress` events, which come by the clock, only if they are named.
    """
    return [
        {key: value for key, value in event.items() if key not in VOLATILE}
        for event in RunDir(folder).log.read()
        if (event["event"] in kinds if kinds else event["event"] != "progress")
    ]


def kinds(folder: Path) -> list[str]:
    return [event["event"] for event in events(folder)]


def state_bits(state) -> dict[str, bytes]:
    """Every bit of a TrainState."""
    bits = {
        "/".join(key): tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for key, tensor in state.tensors().items()
    }
    return bits | {"progress": json.dumps(repr(state.progress)).encode()}
