"""The same with Horovod Elastic: its state is in memory, and its sampler is for any ranks."""

import sys

import horovod.torch as hvd
import torch

from benchmarks.faults import trace
from benchmarks.faults.plain import BATCH, EPOCHS, LanguageModel, Lines, loss_fn

COMMIT_EVERY = 20


def main(folder):
    hvd.init()
    torch.manual_seed(0)
    model, train_set = LanguageModel(), Lines()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    sampler = hvd.elastic.ElasticSampler(train_set)
    loader = torch.utils.data.DataLoader(train_set, BATCH // 2, sampler=sampler)

    @hvd.elastic.run
    def train(state):
        trace.begin()
        while state.epoch < EPOCHS:
            for k, (inputs, targets) in enumerate(loader):
                trace.read(inputs)
                optimizer.zero_grad()
                loss_fn(model(inputs), targets).backward()
                optimizer.step()
                sampler.record_batch(k, len(inputs))
                state.step += 1
                trace.step(hvd.rank(), state.step, state.epoch)
                if state.step % COMMIT_EVERY == 0:
                    state.commit()
                else:
                    state.check_host_updates()
            state.epoch += 1
            sampler.set_epoch(state.epoch)
            state.commit()

    def scale():
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * hvd.size() / 2

    state = hvd.elastic.TorchState(model, optimizer, sampler=sampler, epoch=0, step=0)
    state.register_reset_callbacks([scale])
    train(state)
    if hvd.rank() == 0:
        torch.save(model.state_dict(), f"{folder}/model.pt")


if __name__ == "__main__":
    main(sys.argv[1])
