"""examples/language_model.py with torchrun, DistributedDataParallel and distributed checkpoints.

usage: torchrun --standalone --nproc-per-node 2 --max-restarts 3 language_model_torchrun.py FOLDER

For the comparison in docs/library.md: no growth, no curvature, as exact as its parts allow.
"""

import runpy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, DistributedSampler

EXAMPLE = Path(__file__).parents[2] / "examples/language_model.py"
BATCH, SAVE_STEPS = 32, 5


class Progress:
    """Everything that a checkpoint contains."""

    def __init__(self, model, optimizer, scheduler, average):
        self.model, self.optimizer = model, optimizer
        self.scheduler, self.average = scheduler, average
        self.epoch = self.batch = 0

    def state_dict(self):
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "scheduler": self.scheduler.state_dict(),
            "average": self.average.state_dict(),
            "epoch": self.epoch,
            "batch": self.batch,
        }

    def load_state_dict(self, state):
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.scheduler.load_state_dict(state["scheduler"])
        self.average.load_state_dict(state["average"])
        self.epoch, self.batch = state["epoch"], state["batch"]


def newest(folder):
    """The newest complete checkpoint: DCP writes `.metadata` last."""
    complete = [path.parent for path in folder.glob("*/.metadata")]
    return max(complete, key=lambda path: int(path.name), default=None)


def main():
    example = runpy.run_path(str(EXAMPLE))
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    train_set = example["text"](example["LINES"])
    inputs, targets = example["collate"](example["text"](64, seed=1))
    model = DistributedDataParallel(example["LanguageModel"]())
    average = AveragedModel(model.module, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, example["EPOCHS"])
    sampler = DistributedSampler(train_set, seed=0)  # pads with repeated samples
    loader = DataLoader(train_set, BATCH // size, sampler=sampler, collate_fn=example["collate"])
    progress, steps = Progress(model, optimizer, scheduler, average), 0
    if checkpoint := newest(folder):
        dcp.load({"progress": progress}, checkpoint_id=checkpoint)
        steps = int(checkpoint.name)
        print(f"rank {rank}: from step {steps}", flush=True)
    while progress.epoch < example["EPOCHS"]:
        sampler.set_epoch(progress.epoch)
        done = progress.batch
        for number, (batch, following) in enumerate(loader):
            if number < done:
                continue  # read again, and dropped
            torch.manual_seed(steps * size + rank)  # dropout depends on the number of ranks
            total, tokens = example["loss_fn"](model(batch), following)
            dist.all_reduce(tokens)
            optimizer.zero_grad()
            (total * size / tokens).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            average.update_parameters(model.module)
            steps, progress.batch = steps + 1, number + 1
            if steps % SAVE_STEPS == 0:
                dcp.save({"progress": progress}, checkpoint_id=folder / str(steps))
        scheduler.step()
        progress.epoch, progress.batch = progress.epoch + 1, 0
        if rank == 0:
            average.eval()
            with torch.no_grad():
                total, tokens = example["loss_fn"](average.module(inputs), targets)
            print(f"epoch {progress.epoch} loss {total / tokens:.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
