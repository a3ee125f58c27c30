"""examples/language_model.py with Horovod Elastic.

usage: horovodrun -np 2 --min-np 1 --host-discovery-script FILE python language_model_horovod.py

For the comparison in docs/library.md: no growth, no curvature, and nothing on disk.
"""

import runpy
from pathlib import Path

import horovod.torch as hvd
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

EXAMPLE = Path(__file__).parents[2] / "examples/language_model.py"
BATCH, COMMIT_STEPS = 32, 5


def main():
    hvd.init()
    example = runpy.run_path(str(EXAMPLE))
    torch.manual_seed(0)
    train_set = example["text"](example["LINES"])
    inputs, targets = example["collate"](example["text"](64, seed=1))
    model = example["LanguageModel"]()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), op=hvd.Sum)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, example["EPOCHS"])
    sampler = hvd.elastic.ElasticSampler(train_set)  # pads with repeated samples

    @hvd.elastic.run
    def train(state):
        scheduler.load_state_dict(state.schedule)
        loader = DataLoader(
            train_set, BATCH // hvd.size(), sampler=sampler, collate_fn=example["collate"]
        )
        while state.epoch < example["EPOCHS"]:
            for number, (batch, following) in enumerate(loader):
                # dropout depends on the number of ranks
                torch.manual_seed(state.step * hvd.size() + hvd.rank())
                total, tokens = example["loss_fn"](model(batch), following)
                tokens = hvd.allreduce(tokens, op=hvd.Sum)
                optimizer.zero_grad()
                (total / tokens).backward()
                optimizer.synchronize()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                with optimizer.skip_synchronize():
                    optimizer.step()
                average.update_parameters(model)
                sampler.record_batch(number, len(batch))
                state.step += 1
                if state.step % COMMIT_STEPS == 0:
                    state.commit()
                else:
                    state.check_host_updates()
            scheduler.step()
            state.schedule = scheduler.state_dict()
            state.epoch += 1
            sampler.set_epoch(state.epoch)
            state.commit()
            if hvd.rank() == 0:
                average.eval()
                with torch.no_grad():
                    total, tokens = example["loss_fn"](average.module(inputs), targets)
                print(f"epoch {state.epoch} loss {total / tokens:.4f}", flush=True)

    state = hvd.elastic.TorchState(
        model,
        optimizer,
        average=average,
        sampler=sampler,
        schedule=scheduler.state_dict(),
        epoch=0,
        step=0,
    )
    train(state)


if __name__ == "__main__":
    main()
