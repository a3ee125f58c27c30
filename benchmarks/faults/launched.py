"""The same under `hpc-absa launch`; with another schedule it also grows."""

import sys

import torch

import hpc_absa as absa
from benchmarks.faults import trace
from benchmarks.faults.plain import BATCH, EPOCHS, SAVE_TIME, LanguageModel, Lines, loss_fn


def main(folder):
    torch.manual_seed(0)
    model, train_set = LanguageModel(), Lines()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with absa.Run(model=model, optimizer=optimizer, loss=loss_fn, dataset=train_set, epochs=EPOCHS,
                  schedule=absa.BL(base_batch=BATCH, max_batch=BATCH), microbatch=BATCH // 2,
                  checkpoint={"every_seconds": SAVE_TIME}, reproducible=True) as run:  # fmt: skip
        trace.begin()
        for step in run:
            for inputs, targets in step.batches:
                trace.read(inputs)
                step.backward(loss_fn(model(inputs), targets))
            step.optimize()
            trace.step(run.rank, step.number, int(step.epoch))
    if run.rank == 0:
        torch.save(model.state_dict(), f"{folder}/model.pt")


if __name__ == "__main__":
    main(sys.argv[1])
