"""A small transformer language model on text that this example makes itself.

Lines of different lengths are padded to batches; the loss is a sum over tokens and their number.
AdamW, a learning-rate scheduler of torch, gradient clipping, and an average of the weights that is
saved with the run.
"""

import random

import hpc_absa as absa
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

CHARACTERS = "\0abcdefghijklmnopqrstuvwxyz ."
PADDING = 0
LINES, EPOCHS, WIDTH, LENGTH = 512, 4, 32, 48


def text(lines, seed=0):
    """Lines of simple sentences, as lists of token ids."""
    choose = random.Random(seed).choice
    made = []
    for _ in range(lines):
        subject, verb = choose(["the cat", "a bird", "my friend"]), choose(["sees", "likes"])
        place = choose(["", " in the garden", " at home"])
        made.append(f"{subject} {verb} {choose(['the dog', 'a tree', 'the sea'])}{place}.")
    return [[CHARACTERS.index(character) for character in line] for line in made]


def collate(lines):
    """Inputs and the tokens that follow them, both [b, T], padded."""
    padded = nn.utils.rnn.pad_sequence(
        [torch.tensor(line) for line in lines], batch_first=True, padding_value=PADDING
    )
    return padded[:, :-1], padded[:, 1:]


class LanguageModel(nn.Module):
    """A causal transformer whose output layer shares its weights with the embedding."""

    def __init__(self, width=WIDTH, layers=2, dropout=0.1):
        super().__init__()
        self.embedding = nn.Embedding(len(CHARACTERS), width)
        self.position = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        layer = nn.TransformerEncoderLayer(
            width, 2, 2 * width, dropout, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embedding.weight, std=0.1)

    def forward(self, tokens):
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        hidden = self.embedding(tokens) + self.position[:length]
        return self.norm(self.encoder(hidden, mask, is_causal=True)) @ self.embedding.weight.T


def loss_fn(outputs, targets):
    """The sum over the tokens that are not padding, and their number."""
    flat = outputs.flatten(0, 1), targets.flatten()
    total = cross_entropy(*flat, ignore_index=PADDING, reduction="sum")
    return total, (targets != PADDING).sum()


def main():
    torch.manual_seed(0)
    train_set, (inputs, targets) = text(LINES), collate(text(64, seed=1))
    model = LanguageModel()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)

    def evaluate():
        total, tokens = loss_fn(average.module(inputs), targets)
        return {"loss": total / tokens, "perplexity": torch.exp(total / tokens)}

    with absa.Run(
        model=model,
        optimizer=optimizer,
        schedule=absa.ABSA(base_batch=32, max_batch=128, kappa=2),
        epochs=EPOCHS,
        microbatch=32,
        loss=loss_fn,
        dataset=train_set,
        collate_fn=collate,
        evaluate=evaluate,
        lr_scheduler=scheduler,
        state={"average": average},
        hessian={"samples": 64},
    ) as run:
        for step in run:
            for batch, following in step.batches:
                step.backward(loss_fn(model(batch), following))
            step.reduce()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            step.optimize()
            average.update_parameters(model)


if __name__ == "__main__":
    main()
