"""A small network on handwritten digits."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

EPOCHS = 8


def digits():
    """Training and test set."""
    images, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    inputs, targets = inputs[order], torch.tensor(labels)[order]
    return TensorDataset(inputs[:1440], targets[:1440]), (inputs[1440:], targets[1440:])


def network(width=8):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(16 * width, 10),
    )


def main():
    torch.manual_seed(0)
    train_set, (test_inputs, test_targets) = digits()
    train_loader = DataLoader(train_set, batch_size=16, shuffle=True)
    model, loss_fn = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)

    def evaluate():
        model.eval()
        with torch.no_grad():
            outputs = model(test_inputs)
        model.train()
        accuracy = (outputs.argmax(1) == test_targets).float().mean()
        return {"loss": loss_fn(outputs, test_targets).item(), "accuracy": accuracy.item()}

    for _ in range(EPOCHS):
        for inputs, targets in train_loader:
            optimizer.zero_grad()
            loss = loss_fn(model(inputs), targets)
            loss.backward()
            optimizer.step()
        print(evaluate())
    torch.save(model.state_dict(), "digits.pt")


if __name__ == "__main__":
    main()
