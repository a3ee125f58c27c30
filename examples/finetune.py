"""A new output layer on a frozen network, in mixed precision."""

import hpc_absa as absa
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

EPOCHS = 4


def digits(classes):
    """The images of these digits, and their classes counted from 0."""
    images, labels = load_digits(return_X_y=True)
    chosen = torch.tensor([label in classes for label in labels])
    inputs = torch.tensor(images, dtype=torch.float32)[chosen] / 16
    return inputs, torch.tensor(labels)[chosen] - classes[0]


def network(width=64):
    backbone = nn.Sequential(nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU())
    return nn.Sequential(backbone, nn.Linear(width, 5))


def pretrain(model, inputs, targets, steps=50):
    """Train on other digits, in place of loading weights from a file."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()


def freeze(backbone):
    """Keep its weights and the statistics of its normalizations constant."""
    backbone.requires_grad_(False)
    backbone.eval()


def main():
    torch.manual_seed(0)
    model, loss_fn = network(), nn.CrossEntropyLoss()
    pretrain(model, *digits(range(5)))
    freeze(model[0])
    model[1] = nn.Linear(64, 5)
    inputs, targets = digits(range(5, 10))
    train_set, test = TensorDataset(inputs[:700], targets[:700]), (inputs[700:], targets[700:])
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1, momentum=0.9)

    def evaluate():
        outputs = model(test[0])
        accuracy = (outputs.argmax(1) == test[1]).float().mean()
        return {"loss": loss_fn(outputs, test[1]), "accuracy": accuracy}

    with absa.Run(
        model=model,
        optimizer=optimizer,
        schedule=absa.ABSA(base_batch=20, max_batch=80, kappa=1),
        epochs=EPOCHS,
        microbatch=20,
        loss=loss_fn,
        dataset=train_set,
        evaluate=evaluate,
    ) as run:
        for step in run:
            for batch, classes in step.batches:
                with torch.autocast("cpu", torch.bfloat16):
                    loss = loss_fn(model(batch), classes)
                step.backward(loss)
            step.optimize()


if __name__ == "__main__":
    main()
