"""A training whose state is saved: a real model, real steps, random images."""

from __future__ import annotations

import time

import torch
from torch import nn
from torch.nn import functional

from benchmarks.checkpoint.contenders import State
from hpc_absa import models


class Training:
    """A model under SGD with momentum."""

    def __init__(self, name: str, image: int, batch: int) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = models.build(name, {}, 3, image, 1000)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self._images = torch.randn(batch, 3, image, image)
        self._targets = torch.randint(1000, (batch,))
        self.step()
        self.state = State(self.model, self.optimizer)

    def step(self) -> float:
        """Seconds of one optimizer step."""
        begun = time.perf_counter()
        self.optimizer.zero_grad()
        functional.cross_entropy(self.model(self._images), self._targets).backward()
        self.optimizer.step()
        return time.perf_counter() - begun
