"""A user's training script on the digits, with 1, 2 and 4 microbatches a step.

In its second phase, the last rank kills itself unless the file exists that the first argument
names.
"""

import os
import signal
import sys

import torch
from sklearn.datasets import load_digits

import hpc_absa as absa

MICROBATCH = 32


def main() -> None:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    inputs, targets = torch.tensor(images).float() / 16, torch.tensor(labels)
    model = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.Tanh(), torch.nn.Linear(16, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loss_fn = torch.nn.CrossEntropyLoss()
    with absa.Run(
        model=model,
        optimizer=optimizer,
        loss=loss_fn,
        schedule=absa.GG(base_batch=MICROBATCH, max_batch=4 * MICROBATCH),
        microbatch=MICROBATCH,
        dataset=torch.utils.data.TensorDataset(inputs, targets),
        epochs=4,
        train={"milestones": [1, 2], "lr_decay": 0.5},
        reproducible=True,
    ) as run:
        for step in run:
            for x, y in step.batches:
                step.backward(loss_fn(model(x), y))
            step.optimize()
            if step.number == 70 and run.rank == run.size - 1 and not os.path.exists(sys.argv[1]):
                with open(sys.argv[1], "w"):
                    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
