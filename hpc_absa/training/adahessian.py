"""AdaHessian: Adam with the diagonal of the Hessian in place of squared gradients.

Yao et al., arXiv:2006.00719. The diagonal is Hutchinson's estimate `|z ⊙ Hz|` for random signs z,
with the Hessian of the loss that the step's gradient is of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hpc_absa.comm import Communicator
from hpc_absa.curvature.operator import HessianOperator, evaluation_mode
from hpc_absa.data.order import microbatch_seed
from hpc_absa.errors import UsageError

if TYPE_CHECKING:
    from hpc_absa.data.loader import Loader

Allreduce = Callable[[Tensor], Tensor]


class AdaHessian(torch.optim.Optimizer):
    """`θ ← θ − lr · (m̂ / ((√v̂)^k + ε) + wd · θ)`, m̂ and v̂ with Adam's correction for the start.

    `m ← β₁ m + (1 − β₁) g` and `v ← β₂ v + (1 − β₂) D²`, with D the estimate of the diagonal,
    averaged over the spatial dimensions of each convolution kernel. Before a step that is `due`,
    the caller gives the product `Hz` for z = `signs()`, summed over all ranks:

        if optimizer.due:
            optimizer.estimate(loss)          # or set_product(operator.matvec(optimizer.signs()))
        loss.backward()
        optimizer.step()

    The state has the last D, so that a restored optimizer continues with the same bits.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        hessian_power: float = 1.0,
        hessian_every: int = 1,
        average_rows: bool = False,
        seed: int = 0,
    ) -> None:
        """
        Args:
            params: parameters or groups of them; all with gradients.
            lr: learning rate.
            betas: β₁ and β₂.
            eps: ε.
            weight_decay: wd, decoupled; the authors use 5e-4 / lr.
            hessian_power: k from 0 (momentum) to 1.
            hessian_every: steps for which an estimate of the diagonal is used.
            average_rows: average D over the rows of 2-D weights as well.
            seed: of the signs.
        """
        for beta in betas:
            if not 0 <= beta < 1:
                raise UsageError(f"optimizer.betas: {list(betas)}, expected numbers from 0 below 1")
        if not 0 <= hessian_power <= 1:
            raise UsageError(f"optimizer.hessian_power: {hessian_power}, expected from 0 to 1")
        if hessian_every < 1:
            raise UsageError(f"optimizer.hessian_every: {hessian_every}, expected 1 or more")
        if eps < 0:
            raise UsageError(f"optimizer.eps: {eps}, expected 0 or more")
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay,
                    "hessian_power": hessian_power, "average_rows": average_rows}  # fmt: skip
        super().__init__(params, defaults)
        self.hessian_every, self.seed = hessian_every, seed

    @property
    def parameters(self) -> list[Tensor]:
        """Those that require a gradient, by group."""
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    @property
    def steps(self) -> int:
        """Steps taken."""
        return max((int(state["step"]) for state in self.state.values() if state), default=0)

    @property
    def due(self) -> bool:
        """Whether the next step needs a new estimate of the diagonal."""
        return self.steps % self.hessian_every == 0

    def signs(self) -> list[Tensor]:
        """z: ±1 for each of `parameters`, the same on every rank; depends on seed and steps."""
        generator = torch.Generator().manual_seed(microbatch_seed(self.seed, self.steps))
        return [
            (2 * torch.randint(0, 2, p.shape, generator=generator, dtype=torch.int8) - 1).to(p)
            for p in self.parameters
        ]

    def estimate(self, loss: Tensor, allreduce: Allreduce = lambda tensor: tensor) -> None:
        """Set the diagonal from a loss whose graph is kept.

        Args:
            loss: scalar; on several ranks this rank's share, so that the sum is the whole loss.
            allreduce: sums a tensor over all ranks, in place or not; it gets `Hz` [P].
        """
        parameters, signs = self.parameters, self.signs()
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
        used = [(g, z) for g, z in zip(gradients, signs, strict=True) if g.requires_grad]
        products = [torch.zeros_like(p) for p in parameters]
        if used:
            outputs, vectors = zip(*used, strict=True)
            products = list(
                torch.autograd.grad(
                    outputs, parameters, vectors, retain_graph=True, materialize_grads=True
                )
            )
        self.set_product(allreduce(torch.cat([p.detach().reshape(-1) for p in products])))

    @torch.no_grad()
    def set_product(self, product: Tensor) -> None:
        """Set the diagonal from `Hz` [P] in the order of `parameters`, of all ranks together.

        The absolute value is taken here, after the sum over ranks.
        """
        parameters = self.parameters
        pieces = product.split([p.numel() for p in parameters])
        rows = {id(p): g["average_rows"] for g in self.param_groups for p in g["params"]}
        for p, z, piece in zip(parameters, self.signs(), pieces, strict=True):
            diagonal = (z * piece.view_as(p).to(p)).abs()
            self._state(p)["hessian_diagonal"].copy_(_averaged(diagonal, rows[id(p)]))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self._state(p)
                state["step"] += 1
                step = int(state["step"])
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                diagonal = state["hessian_diagonal"]
                state["exp_hessian_sq"].mul_(beta2).addcmul_(diagonal, diagonal, value=1 - beta2)
                curvature = (state["exp_hessian_sq"] / (1 - beta2**step)).sqrt_()
                denominator = curvature.pow_(group["hessian_power"]).add_(group["eps"])
                update = state["exp_avg"] / (1 - beta1**step) / denominator
                if group["weight_decay"]:
                    update.add_(p, alpha=group["weight_decay"])
                p.add_(update, alpha=-group["lr"])

    def _state(self, parameter: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())  # on the CPU, as torch's
            for name in ("exp_avg", "exp_hessian_sq", "hessian_diagonal"):
                state[name] = torch.zeros_like(parameter)
        return state


def _averaged(diagonal: Tensor, rows: bool) -> Tensor:
    """Over the kernel of a convolution [O, I, ...], or the rows of a matrix."""
    dims = list(range(2, diagonal.dim())) or ([1] if rows and diagonal.dim() == 2 else [])
    return diagonal.mean(dims, keepdim=True).expand_as(diagonal) if dims else diagonal


class StepDiagonal:
    """Gives an `AdaHessian` the diagonal for one training step, over the microbatches of all ranks.

    In training mode: batch norm uses the statistics of each microbatch. The model runs on copies of
    its buffers and random states, and is left as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Any,
        loader: Loader,
        comm: Communicator,
        microbatch: int,
        reproducible: bool,
    ) -> None:
        """
        Args:
            model: in training mode.
            loss: as of the trainer.
            loader: gives the microbatches, with their augmentation.
            comm: communicator.
            microbatch: samples of one.
            reproducible: sum in the fixed order of `hpc_absa.summation`.
        """
        self._model, self._loss, self._comm = model, loss, comm
        self._sample = _StepSample(loader, microbatch)
        self._microbatch, self._reproducible = microbatch, reproducible
        self._operator: HessianOperator | None = None

    def estimate(self, optimizer: AdaHessian, microbatches: range) -> None:
        """Set the diagonal of the mean loss over these microbatches (a collective)."""
        self._sample.start = microbatches.start
        samples = len(microbatches) * self._microbatch
        if self._operator is None or self._operator.samples != samples:
            self._sample.size = samples
            self._operator = HessianOperator(
                self._model, self._loss, self._sample, self._comm, samples=samples,
                microbatch=self._microbatch, keep_graphs=0,
                reproducible=self._reproducible,
            )  # fmt: skip
        mine = list(self._operator.parameters.values())
        signs = dict(zip(map(id, optimizer.parameters), optimizer.signs(), strict=True))
        vector = torch.cat([signs[id(p)].reshape(-1) for p in mine])
        training = [module for module in self._model.modules() if module.training]
        with evaluation_mode(self._model):
            for module in training:
                module.training = True
            product = self._operator.matvec(vector)
        pieces = dict(zip(map(id, mine), product.split([p.numel() for p in mine]), strict=True))
        optimizer.set_product(torch.cat([pieces[id(p)] for p in optimizer.parameters]))


class _StepSample:
    """The microbatches of the step that begins at microbatch `start` of the stream."""

    def __init__(self, loader: Loader, microbatch: int) -> None:
        self._loader, self._microbatch = loader, microbatch
        self.start = self.size = 0

    def load(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        loaded = self._loader.get(self.start + start // self._microbatch)
        return loaded.inputs, loaded.targets
