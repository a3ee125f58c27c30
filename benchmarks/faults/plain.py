"""A character language model in plain PyTorch, on one process."""

import os
import random
import sys

import torch
from torch import nn

BATCH, EPOCHS, CONTEXT, WIDTH = 64, int(os.environ.get("EPOCHS", "2")), 32, 32
STEPS = 34
"""Of one epoch."""
SAVE_EVERY = 10
"""Steps."""
SAVE_TIME = SAVE_EVERY * float(os.environ.get("PACE", "0.1"))
"""The same as a time, if a step takes no longer than its least time."""


class Lines(torch.utils.data.Dataset):
    def __init__(self):
        letters = random.Random(0).choices("etaoin shrdlu", k=4 * BATCH * STEPS + CONTEXT + 1)
        self.tokens = torch.tensor(list("".join(letters).encode()))

    def __len__(self):
        return BATCH * STEPS

    def __getitem__(self, index):
        line = self.tokens[4 * index : 4 * index + CONTEXT + 1]
        return line[:-1], line[1:]


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.place = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.block = nn.TransformerEncoderLayer(WIDTH, 2, 64, dropout=0, batch_first=True)
        self.out = nn.Linear(WIDTH, 256)

    def forward(self, tokens):
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        hidden = self.token(tokens) + self.place(torch.arange(length))
        return self.out(self.block(hidden, src_mask=mask, is_causal=True))


def loss_fn(outputs, targets):
    return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def main(folder):
    torch.manual_seed(0)
    model, train_set = LanguageModel(), Lines()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = torch.utils.data.DataLoader(train_set, BATCH, shuffle=True, drop_last=True)
    for _ in range(EPOCHS):
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss_fn(model(inputs), targets).backward()
            optimizer.step()
    torch.save(model.state_dict(), f"{folder}/model.pt")


if __name__ == "__main__":
    main(sys.argv[1])
