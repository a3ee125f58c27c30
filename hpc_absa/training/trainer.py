"""The training loop of a job file, as the algorithm: step, evaluate, estimate, decide, save."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from hpc_absa.adversarial import fgsm
from hpc_absa.allocation import REHEARSED
from hpc_absa.curvature.loss import Loss, split
from hpc_absa.data.loader import Loader, Microbatch
from hpc_absa.plugins import user_code
from hpc_absa.progress import Boundary, Step
from hpc_absa.records import PhaseOutcome
from hpc_absa.training.adahessian import AdaHessian, StepDiagonal
from hpc_absa.training.evaluate import Evaluation, call, evaluate
from hpc_absa.training.layer_precision import LayerPrecision
from hpc_absa.training.layer_rates import LayerRates
from hpc_absa.training.metrics import Metric
from hpc_absa.training.rehearsal import rehearse
from hpc_absa.training.run import Run
from hpc_absa.training.step import MicrobatchLoss


@dataclass(frozen=True)
class Adversary:
    """Parameters of the fast gradient sign method in the model's input space."""

    step: Tensor
    """ε, [1, C, 1, 1] or another shape that broadcasts to the inputs."""
    valid: tuple[Tensor, Tensor] | None
    """Smallest and largest valid input, likewise; None: those of the microbatch."""


class Trainer:
    """Trains on the present ranks, until done, stopped, or to be continued with more ranks."""

    def __init__(
        self,
        run: Run,
        loader: Loader,
        loss: Loss,
        adversary: Adversary | None = None,
        *,
        metrics: Sequence[Metric] = (),
        evaluation_batch: int = 256,
        bfloat16: bool = False,
        reproducible: bool = False,
        names: tuple[str, str] = ("the model", "the loss"),
        rates: LayerRates | None = None,
        precision: LayerPrecision | None = None,
    ) -> None:
        """
        Args:
            run: the run, with model and optimizer.
            loader: the data.
            loss: of (outputs, targets) of a microbatch: a mean, or `(sum, denominator)`.
            adversary: for schedules with adversarial examples.
            metrics: of the test set.
            evaluation_batch: test samples of one forward pass.
            bfloat16: forward passes in bfloat16 where PyTorch considers that safe; weights,
                gradients, statistics of batch norm and the loss stay float32.
            reproducible: as in the job.
            names: of model and loss, for messages.
            rates: sets a learning rate for each layer at decision points.
            precision: chooses at decision points the layers that compute in bfloat16.
        """
        self.run, self.loader, self.loss, self.adversary = run, loader, loss, adversary
        self.metrics, self.evaluation_batch = metrics, evaluation_batch
        self.bfloat16, self.reproducible, self.names = bfloat16, reproducible, names
        self.rates, self.precision = rates, precision
        self.diagonal = StepDiagonal(
            self.model, loss, loader, run.comm, run.stream.microbatch, reproducible
        )

    @property
    def model(self) -> nn.Module:
        return self.run.state.model

    def train(self) -> PhaseOutcome:
        run = self.run
        run.begin_phase()
        if run.steps_left and REHEARSED not in os.environ:
            rehearse(self)
        while (item := run.next()) is not None:
            if isinstance(item, Step):
                self.train_step(item)
                continue
            if run.needs_evaluation(item):
                evaluation = self.evaluate()
                run.record_epoch(item, evaluation.loss, evaluation.accuracy, evaluation.metrics)
            estimate = run.estimate_eigenvalue(item)
            if run.stopped:
                continue
            self.decide_by_layer(item)
            decision = run.decide(item, estimate)
            if step := run.cut_step(item, decision):
                self.train_step(step)
            run.apply(item, decision, estimate)
        self.loader.close()
        return run.end()

    def train_step(self, item: Step) -> None:
        """One optimizer step."""
        self.estimate_diagonal(item)
        clock, fraction = self.run.clock, self.run.adversarial_fraction
        with clock("comp"):
            step, upcoming = self.run.begin_step(item), self.upcoming(item)
            for index, k in enumerate(step.microbatches, start=1):
                with clock("data"):
                    then = upcoming[index : index + self.loader.ahead]
                    microbatch = self.loader.get(k, then)
                inputs, targets = self.perturbed(microbatch, fraction), microbatch.targets
                samples = len(microbatch.samples)
                try:
                    with step.forward():
                        loss = self.microbatch_loss(self.forward(inputs), targets, samples)
                except Exception:
                    some = ", ".join(map(str, microbatch.samples[:8]))
                    more = f", ... ({samples})" if samples > 8 else ""
                    with user_code(f"model and loss on samples {some}{more}"):
                        raise
                step.backward(loss, samples)
            self.run.end_step(item, step.optimize())

    def decide_by_layer(self, boundary: Boundary) -> None:
        """Where the job wants learning rates or a precision by layer: from the curvature here."""
        run = self.run
        if not boundary.decision_point or boundary.last:
            return
        step, phase = run.state.progress.position.step, run.state.progress.phase
        for kind, layers in (("layer_rates", self.rates), ("layer_precision", self.precision)):
            if layers is not None:
                with run.clock("hessian"):
                    found = layers.update(step)
                run.log.emit_when_saved(kind, phase, epoch=boundary.epoch, step=step, **found)

    def estimate_diagonal(self, item: Step) -> None:
        """For AdaHessian: the diagonal of the Hessian of the step's loss, if it is due."""
        optimizer = self.run.state.optimizer
        if isinstance(optimizer, AdaHessian) and optimizer.due:
            with self.run.clock("diagonal"):
                self.diagonal.estimate(optimizer, item.microbatches)

    def upcoming(self, item: Step) -> list[int]:
        """This rank's microbatches of the step, and those after it that the loader prepares."""
        run, lanes = self.run, self.run.engine.lanes
        order = [k for lane in lanes(item.microbatches) for k in lane]
        full = run.state.progress.schedule.global_batch // run.stream.microbatch
        for start in range(item.stop, item.stop + self.loader.ahead * full, full):
            if start + full <= run.stream.microbatches:
                order += [k for lane in lanes(range(start, start + full)) for k in lane]
        return order

    def forward(self, inputs: Any) -> Any:
        """The model's outputs; in mixed precision as float32, because the loss is a sum over few
        numbers.
        """
        with self.autocast():
            outputs = call(self.model, inputs)
        return tree_map_only(Tensor, _float, outputs) if self.bfloat16 else outputs

    def microbatch_loss(self, outputs: Any, targets: Any, samples: int) -> MicrobatchLoss:
        """The mean over the samples, or `(sum, denominator)` where the loss has another one."""
        result = self.loss(outputs, targets)
        if isinstance(result, tuple):
            return result
        mean, denominator = split(self.loss, result, targets, samples)
        return mean if denominator == samples else (mean * denominator, denominator)

    def perturbed(self, microbatch: Microbatch, fraction: float) -> Any:
        """The inputs, a fraction of them replaced by adversarial examples."""
        inputs, targets = microbatch.inputs, microbatch.targets
        count = int(fraction * len(microbatch.samples) + 1e-9)  # 0.29 · 100 is 28.999…
        if not count or not self.adversary:
            return inputs
        with self.run.clock("adversarial"), self.autocast():
            return fgsm.perturb(
                self.model,
                self.loss,
                inputs,
                targets,
                self.adversary.step,
                self.adversary.valid,
                count,
                call,
            )

    def evaluate(self) -> Evaluation:
        """Loss and metrics on the test set."""
        run = self.run
        share = self.loader.evaluation(run.comm.rank, run.comm.size, self.evaluation_batch)
        with run.clock("eval"):
            batches = run.stop.count_progress(share)
            return evaluate(self.model, self.loss, self.metrics, batches, run.comm)

    def autocast(self) -> AbstractContextManager[Any]:
        if self.precision is not None:
            return self.precision.autocast()
        if not self.bfloat16:
            return nullcontext()
        device = self.run.engine.device.type
        return torch.autocast(device, torch.bfloat16)


def _float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
