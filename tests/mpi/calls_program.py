"""A user's script in which one of two ranks does something else than the other one.

usage: calls_program.py FOLDER WHAT
"""

import sys

import torch

import hpc_absa as absa

SAMPLES, EPOCHS = 24, 40


def main(folder, what):
    model = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Flatten(0))
    inputs = torch.arange(3.0 * SAMPLES).view(SAMPLES, 3) / 100
    with absa.Run(
        folder,
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-3),
        schedule=absa.FB(base_batch=8),
        epochs=EPOCHS,
        microbatch=4,
        dataset=inputs,
        evaluate=lambda: run.sum(1.0) if (what, run.rank) == ("evaluate", 0) else 1.0,
    ) as run:
        odd = run.rank == 1
        for step in run:
            for batch in step.batches:
                step.backward((model(batch) - 1).square().mean())
            step.optimize()
            if step.number == 2 and what == "raise" and odd:
                raise ValueError("mine")
            if step.number == 2 and what == "sum" and not odd:
                run.sum(step.loss)
            if step.number == 2 and (what == "all" or (what == "break" and odd)):
                break
        if what == "after" and odd:
            run.sum(1)
        if what == "exit" and odd:
            sys.exit()
    if run.rank == 0:
        print("the end of the script")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
