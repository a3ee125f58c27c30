"""One rank of one contender: trains a job until it is killed, and notes when each step ended.

All contenders have the model, the optimizer, the loss and the batches that the job names.
"""

from __future__ import annotations

import os
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpc_absa import config
from hpc_absa.comm import SerialCommunicator
from hpc_absa.config import Job
from hpc_absa.plan import stream_of
from hpc_absa.rundir import RunDir
from hpc_absa.torchvision_import import prepare_torchvision
from hpc_absa.training import optimizer as optimizers
from hpc_absa.training.data import build_loader, open_data
from hpc_absa.training.setup import build_model_and_loss


class Stamps:
    """The end of each step, by the clock that all processes share."""

    def __init__(self, folder: Path, rank: int) -> None:
        (folder / f"pid-{rank}").write_text(str(os.getpid()))
        self._file = os.open(folder / "steps", os.O_WRONLY | os.O_CREAT) if rank == 0 else None

    def step(self) -> None:
        if self._file is not None:
            os.write(self._file, struct.pack("d", time.monotonic()))


class Parts:
    """What a loop of the peers' needs, made by the functions that a run of ours uses."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.job: Job = config.load(path)
        torch.set_num_threads(self.job.train.threads_per_rank or 1)
        self.device = torch.device("cpu")
        self.dataset = open_data(self.job, RunDir(folder), SerialCommunicator())
        self.stream = stream_of(self.job, len(self.dataset.train))
        self.model, _ = build_model_and_loss(self.job, self.dataset, self.device)
        self.loss = nn.functional.cross_entropy

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        train = self.job.train
        return optimizers.build(train, self.job.optimizer.arguments, model, lr=train.lr)

    def batches(self, rank: int, size: int) -> Iterator[tuple[Any, Any]]:
        loader = build_loader(self.job, self.dataset, self.stream, self.device)
        for k in range(rank, self.stream.microbatches, size):
            batch = loader.get(k, [k + size][: loader.ahead])
            yield batch.inputs, batch.targets


def ours(path: Path, folder: Path) -> None:
    """`hpc-absa train`."""
    from hpc_absa.training import rank
    from hpc_absa.training.trainer import Trainer

    train_step, stamps = Trainer.train_step, list[Stamps]()

    def stamped(trainer: Trainer, item: Any) -> None:
        if not stamps:
            stamps.append(Stamps(folder, trainer.run.comm.rank))
        train_step(trainer, item)
        stamps[0].step()

    Trainer.train_step = stamped  # type: ignore[method-assign]
    rank.main(path, folder / "run", (), ())


def script(path: Path, folder: Path) -> None:
    """`hpc_absa.Run` around a loop, with a data set that reads the same batches."""
    import hpc_absa as absa

    parts = Parts(path, folder)
    job, loader = parts.job, build_loader(parts.job, parts.dataset, parts.stream, parts.device)
    with absa.Run(
        folder / "run",
        model=parts.model,
        optimizer=parts.optimizer(parts.model),
        schedule=absa.BL(base_batch=job.schedule.base_batch, max_batch=job.schedule.base_batch),
        epochs=job.train.epochs,
        microbatch=job.train.microbatch,
        samples=parts.stream.samples,
    ) as run:
        stamps, k = Stamps(folder, run.rank), run.rank
        for step in run:
            for _ in step.microbatches:
                batch = loader.get(k, [k + run.size][: loader.ahead])
                k += run.size
                step.backward(parts.loss(parts.model(batch.inputs), batch.targets))
            step.optimize()
            stamps.step()


def loop(
    parts: Parts,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rank: int,
    size: int,
    folder: Path,
) -> None:
    """As in PyTorch's tutorials."""
    stamps = Stamps(folder, rank)
    for inputs, targets in parts.batches(rank, size):
        optimizer.zero_grad()
        parts.loss(model(inputs), targets).backward()
        optimizer.step()
        stamps.step()


def plain(path: Path, folder: Path) -> None:
    parts = Parts(path, folder)
    loop(parts, parts.model, parts.optimizer(parts.model), 0, 1, folder)


def ddp(path: Path, folder: Path) -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    parts = Parts(path, folder)
    model = DistributedDataParallel(parts.model, gradient_as_bucket_view=True)
    loop(parts, model, parts.optimizer(model), dist.get_rank(), dist.get_world_size(), folder)


def horovod(path: Path, folder: Path) -> None:
    import horovod.torch as hvd

    hvd.init()
    parts = Parts(path, folder)
    hvd.broadcast_parameters(parts.model.state_dict(), root_rank=0)
    optimizer = hvd.DistributedOptimizer(
        parts.optimizer(parts.model), named_parameters=parts.model.named_parameters()
    )
    loop(parts, parts.model, optimizer, hvd.rank(), hvd.size(), folder)


def lightning(path: Path, folder: Path) -> None:
    prepare_torchvision()  # which its metrics import
    import lightning

    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    parts = Parts(path, folder)

    class Batches(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return parts.batches(rank, size)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.stamps = parts.model, Stamps(folder, rank)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            inputs, targets = batch
            return parts.loss(self.model(inputs), targets)

        def on_train_batch_end(self, *arguments: Any) -> None:
            self.stamps.step()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return parts.optimizer(self.model)

    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=size,
        strategy="ddp" if size > 1 else "auto",
        max_epochs=1,
        barebones=True,
        use_distributed_sampler=False,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(Batches(), batch_size=None))


CONTENDERS: dict[str, Callable[[Path, Path], None]] = {
    function.__name__: function for function in (ours, script, plain, ddp, horovod, lightning)
}


if __name__ == "__main__":
    CONTENDERS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
