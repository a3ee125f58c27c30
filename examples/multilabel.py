"""Several labels for each sample, from a data set that returns dictionaries, read by workers."""

import hpc_absa as absa
import torch
from torch import nn
from torch.utils.data import Dataset, default_collate

SAMPLES, EPOCHS, LABELS = 512, 4, 5


class Shapes(Dataset):
    """Noisy 8×8 images in which each of five patterns may be present."""

    def __init__(self, samples, seed):
        generator = torch.Generator().manual_seed(seed)
        patterns = torch.randn(LABELS, 64, generator=torch.Generator().manual_seed(7))
        self.labels = (torch.rand(samples, LABELS, generator=generator) < 0.3).float()
        self.images = (self.labels @ patterns).view(-1, 1, 8, 8)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        noise = 0.5 * torch.randn(1, 8, 8)  # the same for a sample and epoch on any rank
        return {"image": self.images[index] + noise, "labels": self.labels[index]}


def collate(samples):
    batch = default_collate(samples)
    return batch["image"], batch["labels"]


def network(width=8):
    return nn.Sequential(
        nn.Conv2d(1, width, 3),
        nn.GroupNorm(2, width),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(36 * width, LABELS),
    )


def main():
    torch.manual_seed(0)
    images, labels = collate([Shapes(256, seed=1)[i] for i in range(256)])
    model, loss_fn = network(), nn.BCEWithLogitsLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)

    def evaluate():
        outputs = model(images)
        found = outputs > 0
        f1 = 2 * (found * labels).sum() / (found.sum() + labels.sum())
        return {"loss": loss_fn(outputs, labels), "f1": f1}

    with absa.Run(
        model=model,
        optimizer=optimizer,
        schedule=absa.ABSA(base_batch=16, max_batch=64, kappa=1),
        epochs=EPOCHS,
        microbatch=16,
        loss=loss_fn,
        dataset=Shapes(SAMPLES, seed=0),
        collate_fn=collate,
        num_workers=2,
        evaluate=evaluate,
        hessian={"samples": 64},
    ) as run:
        for step in run:
            for inputs, targets in step.batches:
                step.backward(loss_fn(model(inputs), targets))
            step.optimize()


if __name__ == "__main__":
    main()
