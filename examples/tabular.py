"""A regression on a table, read by index; AdamW without weight decay for biases."""

import hpc_absa as absa
import torch
from torch import nn

SAMPLES, FEATURES, EPOCHS = 2048, 8, 6


def table(samples, seed):
    """Features [n, 8] and targets [n] with some noise."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(samples, FEATURES, generator=generator)
    targets = features[:, 0] * features[:, 1] + features[:, 2:].sin().sum(1)
    return features, targets + 0.1 * torch.randn(samples, generator=generator)


def network(width=32):
    return nn.Sequential(
        nn.Linear(FEATURES, width),
        nn.GELU(),
        nn.Linear(width, width),
        nn.GELU(),
        nn.Linear(width, 1),
        nn.Flatten(0),
    )


def main():
    torch.manual_seed(0)
    features, targets = table(SAMPLES, seed=0)
    test_features, test_targets = table(512, seed=1)
    model, loss_fn = network(), nn.MSELoss()
    weights = [p for p in model.parameters() if p.dim() > 1]
    biases = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "weight_decay": 0.01}, {"params": biases, "weight_decay": 0.0}],
        lr=3e-3,
    )
    with absa.Run(
        model=model,
        optimizer=optimizer,
        schedule=absa.ABSA(base_batch=32, max_batch=256, kappa=2),
        epochs=EPOCHS,
        microbatch=32,
        loss=loss_fn,
        samples=SAMPLES,
        hessian_batch=lambda indices: (features[indices], targets[indices]),
        evaluate=lambda: loss_fn(model(test_features), test_targets),
    ) as run:
        for step in run:
            for indices in step.microbatches:
                step.backward(loss_fn(model(features[indices]), targets[indices]))
            step.optimize()


if __name__ == "__main__":
    main()
