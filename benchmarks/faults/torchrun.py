"""The same under torchrun, with DDP and torch.distributed.checkpoint, and resumed in mid-epoch."""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

from benchmarks.faults import trace
from benchmarks.faults.plain import BATCH, EPOCHS, SAVE_EVERY, LanguageModel, Lines, loss_fn


def main(folder):
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model, train_set = DistributedDataParallel(LanguageModel()), Lines()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step, saved = 0, f"{folder}/saved"
    if os.path.isdir(saved) and (names := sorted(os.listdir(saved))):
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments, "step": 0}
        dcp.load(state, checkpoint_id=f"{saved}/{names[-1]}")
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        step = state["step"]
    steps = len(train_set) // BATCH
    trace.begin()
    while step < EPOCHS * steps:
        epoch, k = divmod(step, steps)
        order = torch.randperm(len(train_set), generator=torch.Generator().manual_seed(epoch))
        indices = order[k * BATCH : (k + 1) * BATCH][rank::size]
        inputs, targets = torch.utils.data.default_collate([train_set[int(i)] for i in indices])
        trace.read(inputs)
        optimizer.zero_grad()
        loss_fn(model(inputs), targets).backward()
        optimizer.step()
        step += 1
        if step % SAVE_EVERY == 0:
            weights, moments = get_state_dict(model, optimizer)
            state = {"model": weights, "optimizer": moments, "step": step}
            dcp.save(state, checkpoint_id=f"{saved}/{step:08d}")
        trace.step(rank, step, epoch)
    if rank == 0:
        torch.save(model.module.state_dict(), f"{folder}/model.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
