"""The training loop of a job file, as the algorithm: step, evaluate, estimate, decide, save."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hpc_absa.adversarial import fgsm
from hpc_absa.curvature.loss import Loss, split
from hpc_absa.data.loader import Loader, Microbatch
from hpc_absa.progress import Step
from hpc_absa.records import PhaseOutcome
from hpc_absa.training.evaluate import Evaluation, evaluate
from hpc_absa.training.rehearsal import rehearse
from hpc_absa.training.run import Run
from hpc_absa.training.step import MicrobatchLoss

EVALUATION_BATCH = 256
"""Test samples of one forward pass."""


@dataclass(frozen=True)
class Adversary:
    """Parameters of the fast gradient sign method in the model's input space."""

    step: Tensor
    """ε, [1, C, 1, 1]."""
    valid: tuple[Tensor, Tensor]
    """Smallest and largest valid input, [1, C, 1, 1] each."""


class Trainer:
    """Trains on the present ranks, until done, stopped, or to be continued with more ranks."""

    def __init__(
        self,
        run: Run,
        loader: Loader,
        loss: Loss,
        adversary: Adversary | None = None,
        *,
        bfloat16: bool = False,
        reproducible: bool = False,
        names: tuple[str, str] = ("the model", "the loss"),
    ) -> None:
        """
        Args:
            run: the run, with model and optimizer.
            loader: the data.
            loss: of (outputs, targets) of a microbatch: a mean, or `(sum, denominator)`.
            adversary: for schedules with adversarial examples.
            bfloat16: forward passes in bfloat16 where PyTorch considers that safe; weights,
                gradients, statistics of batch norm and the loss stay float32.
            reproducible: as in the job.
            names: of model and loss, for messages.
        """
        self.run, self.loader, self.loss, self.adversary = run, loader, loss, adversary
        self.bfloat16, self.reproducible, self.names = bfloat16, reproducible, names

    @property
    def model(self) -> nn.Module:
        return self.run.state.model

    def train(self) -> PhaseOutcome:
        run = self.run
        run.begin_phase()
        if run.steps_left:
            rehearse(self)
        while (item := run.next()) is not None:
            if isinstance(item, Step):
                self.train_step(item)
                continue
            if run.needs_evaluation(item):
                evaluation = self.evaluate()
                run.record_epoch(item, evaluation.loss, evaluation.accuracy)
            estimate = run.estimate_eigenvalue(item)
            if run.stopped:
                continue
            decision = run.decide(item, estimate)
            if step := run.cut_step(item, decision):
                self.train_step(step)
            run.apply(item, decision, estimate)
        self.loader.close()
        return run.end()

    def train_step(self, item: Step) -> None:
        """One optimizer step."""
        clock, fraction = self.run.clock, self.run.adversarial_fraction
        step = self.run.begin_step(item)
        for k in step.microbatches:
            with clock("data"):
                microbatch = self.loader.get(k, then=step.following(k))
            inputs, targets = self.perturbed(microbatch, fraction), microbatch.targets
            with clock("comp"):
                with step.forward():
                    with self.autocast(inputs):
                        outputs = self.model(inputs)
                    # in float32: the loss is a sum over few numbers
                    outputs = outputs.float() if self.bfloat16 else outputs
                    loss = self.microbatch_loss(outputs, targets, len(targets))
                step.backward(loss, samples=len(targets))
        self.run.end_step(item, step.optimize())

    def microbatch_loss(self, outputs: Any, targets: Any, samples: int) -> MicrobatchLoss:
        """The mean over the samples, or `(sum, denominator)` where the loss has another one."""
        result = self.loss(outputs, targets)
        if isinstance(result, tuple):
            return result
        mean, denominator = split(self.loss, result, targets, samples)
        return mean if denominator == samples else (mean * denominator, denominator)

    def perturbed(self, microbatch: Microbatch, fraction: float) -> Tensor:
        """The inputs, a fraction of them replaced by adversarial examples."""
        inputs, targets = microbatch.inputs, microbatch.targets
        count = int(fraction * len(targets) + 1e-9)  # 0.29 · 100 is 28.999…
        if not count or not self.adversary:
            return inputs
        with self.run.clock("adversarial"), self.autocast(inputs):
            return fgsm.perturb(
                self.model,
                self.loss,
                inputs,
                targets,
                self.adversary.step,
                self.adversary.valid,
                count,
            )

    def evaluate(self) -> Evaluation:
        """Accuracy and loss on the test set."""
        run = self.run
        share = self.loader.evaluation(run.comm.rank, run.comm.size, EVALUATION_BATCH)
        with run.clock("eval"):
            return evaluate(self.model, self.loss, run.stop.count_progress(share), run.comm)

    def autocast(self, inputs: Tensor) -> AbstractContextManager[None]:
        return torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.bfloat16)
