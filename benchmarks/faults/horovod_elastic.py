"""The same with Horovod Elastic: its state is in memory, and its sampler is for any ranks."""

import sys

import horovod.torch as hvd
import torch

from benchmarks.faults import trace
from benchmarks.faults.plain import BATCH, EPOCHS, SAVE_EVERY, LanguageModel, Lines, loss_fn


def main(folder):
    hvd.init()
    torch.manual_seed(0)
    model, train_set = LanguageModel(), Lines()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    sampler = hvd.elastic.ElasticSampler(train_set)

    @hvd.elastic.run
    def train(state):
        trace.begin()
        loader = torch.utils.data.DataLoader(train_set, BATCH // hvd.size(), sampler=sampler)
        while state.epoch < EPOCHS:
            for k, (inputs, targets) in enumerate(loader):
                trace.read(inputs)
                optimizer.zero_grad()
                loss_fn(model(inputs), targets).backward()
                optimizer.step()
                sampler.record_batch(k, len(inputs))
                state.step += 1
                trace.step(hvd.rank(), state.step, state.epoch)
                if state.step % SAVE_EVERY == 0:
                    state.commit()  # check_host_updates in between would return `step` to this one
            state.epoch += 1
            sampler.set_epoch(state.epoch)
            state.commit()

    state = hvd.elastic.TorchState(model, optimizer, sampler=sampler, epoch=0, step=0)
    train(state)
    if hvd.rank() == 0:
        torch.save(model.state_dict(), f"{folder}/model.pt")


if __name__ == "__main__":
    main(sys.argv[1])
