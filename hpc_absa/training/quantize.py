"""`hpc-absa quantize`: bits for each layer by the Hessian, and the accuracy they cost (HAWQ)."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from torch import Tensor, nn

from hpc_absa.comm import Communicator, raise_on_all_ranks
from hpc_absa.console import rich_console
from hpc_absa.errors import UsageError
from hpc_absa.quantization import fake, stored
from hpc_absa.quantization import result as output
from hpc_absa.quantization.allocation import (
    Limit,
    Problem,
    pareto_front,
    parse_limit,
    random_choices,
    read_latencies,
    solve,
)
from hpc_absa.quantization.fake import Ranges
from hpc_absa.quantization.graph import Network, trace
from hpc_absa.quantization.result import Check, Measured, Quantization
from hpc_absa.quantization.sensitivity import Sensitivity, sensitivities
from hpc_absa.rundir.files import require_replaceable
from hpc_absa.training.evaluate import Evaluation
from hpc_absa.training.finetune import finetune
from hpc_absa.training.load import Loaded, Source, load, on_ranks


@dataclass(frozen=True)
class Options:
    bits: tuple[int, ...] = (4, 8)
    """Choices, ascending."""
    limits: tuple[tuple[str, str], ...] = (("size", "0.5"),)
    """Costs and their limits, as `allocation.parse_limit` takes them."""
    latencies: Path | None = None
    """A latency table (`allocation.read_latencies`)."""
    samples: int = 256
    """Training samples, for traces and calibration."""
    matvecs: int = 12
    """Products for the trace of each layer."""
    test_samples: int | None = None
    """At equal distances in the test set; None for all."""
    check: int = 0
    """Random allocations to compare with; also compares Ω with measured losses. 0 for neither."""
    check_samples: int = 2048
    """Training samples on which the check measures losses."""
    finetune: int = 0
    """Epochs."""
    lr: float = 1e-4
    """Of fine-tuning."""

    def check_values(self, source: Source, out: Path | None) -> None:
        """Raises a UsageError for what is out of range, or where `out` cannot be written."""
        if self.finetune and (source.mean or source.std):
            raise UsageError(
                "--finetune: expected none with --mean or --std: a job normalises its inputs by "
                "the mean and standard deviation of its own training set"
            )
        if self.finetune and out is None:
            raise UsageError("--finetune: expected also --out, for the run directory of the epochs")
        if not 0 < self.lr < math.inf:
            raise UsageError(f"--lr {self.lr:g}: expected a positive number")
        for suffix in ("json", "npz", "png") if out else ():
            require_replaceable(Path(f"{out}.{suffix}"))
        if list(self.bits) != sorted(set(self.bits)) or len(self.bits) < 2:
            raise UsageError(f"--bits {self.bits}: expected two or more ascending numbers: 4,8")
        if not (self.bits[0] >= 2 and self.bits[-1] <= 16):
            raise UsageError(f"--bits {self.bits}: expected numbers from 2 to 16")
        for cost, text in self.limits:
            parse_limit(cost, text)
            if cost == "latency" and self.latencies is None:
                raise UsageError(f"--latency {text}: expected also --latency-table FILE")


def quantize(source: Source, out: Path | None, as_json: bool, options: Options) -> int:
    """Print the allocation and what it costs; the entry point of one rank."""

    def command(comm: Communicator) -> int:
        raise_on_all_ranks(comm, lambda: options.check_values(source, out))
        loaded = load(source, comm)
        with Console(stderr=True, quiet=comm.rank > 0).status("quantize") as status:
            result = Quantizer(loaded, comm, options, status.update).run(out)
        if comm.rank == 0:
            if as_json:
                print(json.dumps(output.as_dict(result), allow_nan=False))
            else:
                for table in output.tables(result):
                    rich_console().print(table)
            if result.files:
                print(f"written: {', '.join(result.files)}", file=sys.stderr)
        return 0

    return on_ranks(command)


class Quantizer:
    """The steps of the command on one loaded model; all methods are collectives."""

    def __init__(
        self,
        loaded: Loaded,
        comm: Communicator,
        options: Options,
        progress: Callable[[str], None] = lambda part: None,
    ) -> None:
        self.loaded, self.comm, self.options, self.progress = loaded, comm, options, progress
        self.sample = loaded.training_sample(options.samples)
        inputs, _ = self.sample.load(0, 1)
        self.network = raise_on_all_ranks(comm, lambda: self._trace(inputs))
        names = [layer.name for layer in self.network.layers]
        self.fixed = (names[0], names[-1])
        """At the most bits, outside the program (HAWQ)."""
        self.layers = [layer for layer in self.network.layers if layer.name not in self.fixed]
        if not self.layers:
            raise UsageError(
                f"quantize: the model has the layers {', '.join(names)}, and the first and the "
                "last keep the most bits; expected at least one more"
            )
        self.latencies = raise_on_all_ranks(comm, self._latencies)

    def run(self, out: Path | None) -> Quantization:
        """Everything that the options name; rank 0 writes files that begin with `out`."""
        options, comm = self.options, self.comm
        found = sensitivities(
            self.loaded.model, self.loaded.loss, self.sample, comm, self.network.layers,
            options.bits, microbatch=self.loaded.stream.microbatch, matvecs=options.matvecs,
            progress=lambda name: self.progress(f"trace of {name}"),
        )  # fmt: skip
        problem = self.problem(found)
        limits = [parse_limit(cost, text) for cost, text in options.limits]
        choice = raise_on_all_ranks(comm, lambda: solve(problem, limits))
        front = pareto_front(problem, "size")
        self.progress("calibration")
        ranges = self.ranges()
        chosen = self.allocation(choice)
        measured = [self.measure("float32", None, None, problem)]
        uniform = range(len(options.bits))
        for index in reversed(uniform):
            same = [index] * len(self.layers)
            measured.append(self.measure(f"{options.bits[index]} bits", same, ranges, problem))
        measured.insert(2, self.measure("mixed", choice, ranges, problem))
        check = self.check(found, problem, choice, ranges) if options.check else None
        files: list[str] = []
        if out is not None:
            stored_file = Path(f"{out}.npz")
            raise_on_all_ranks(comm, lambda: self.save(stored_file, chosen, ranges))
            files += [str(stored_file)]
            if options.finetune:
                self.progress("fine-tuning")
                directory = Path(f"{out}-finetuned")
                model = finetune(
                    self.loaded.job, stored_file, directory, comm, options.finetune, options.lr
                )
                tuned = self.evaluate(model)
                before = measured[2]
                measured.insert(3, Measured(
                    "mixed, tuned", before.size, before.bops, before.latency, before.omega,
                    tuned.accuracy, tuned.loss,
                ))  # fmt: skip
                files += [str(directory)]
        groups = tuple(tuple(problem.names[i] for i in group) for group in problem.groups)
        absolute = {limit.cost: limit.absolute(problem) for limit in limits}
        result = Quantization(
            self.loaded.origin, options.bits, tuple(found), self.fixed, groups, absolute, chosen,
            tuple(measured), front, check,
        )  # fmt: skip
        if out is not None and comm.rank == 0:
            files += output.write(result, problem, choice, ranges, out)
        return replace(result, files=tuple(files))

    def problem(self, found: Sequence[Sensitivity]) -> Problem:
        """The integer program over the layers that can choose."""
        names = [layer.name for layer in self.layers]
        omega = {s.layer.name: s.omega for s in found}
        bits = np.array(self.options.bits, np.float64)
        costs = {
            "size": np.array([layer.parameters * bits / 8 for layer in self.layers]),
            "bops": np.array([layer.macs * bits**2 / 32**2 for layer in self.layers]),
        }
        if self.latencies is not None:
            costs["latency"] = self.latencies
        all_names = [layer.name for layer in self.network.layers]
        groups = [
            tuple(names.index(all_names[i]) for i in group if all_names[i] in names)
            for group in self.network.added
        ]
        return Problem(
            tuple(names),
            self.options.bits,
            np.array([omega[name] for name in names]),
            costs,
            tuple(group for group in groups if len(group) > 1),
        )

    def ranges(self) -> Ranges:
        """Of the inputs of all layers, from rank 0: the last bits depend on its threads."""
        step, size = self.loaded.stream.microbatch, self.sample.size
        batches = (
            self.sample.load(start, min(start + step, size))[0] for start in range(0, size, step)
        )
        found = None
        if self.comm.rank == 0:
            found = fake.calibrate(self.network, batches, self.options.bits)
        ranges: Ranges = self.comm.broadcast_object(found)
        return ranges

    def allocation(self, choice: Sequence[int]) -> dict[str, int]:
        """Bits by layer of the whole network."""
        bits = self.options.bits
        chosen = {layer.name: bits[index] for layer, index in zip(self.layers, choice, strict=True)}
        return {layer.name: chosen.get(layer.name, bits[-1]) for layer in self.network.layers}

    def measure(
        self, name: str, choice: Sequence[int] | None, ranges: Ranges | None, problem: Problem
    ) -> Measured:
        """Costs of the whole network and its accuracy; float32 without a choice."""
        self.progress(f"accuracy with {name}")
        if choice is None:
            size = sum(4.0 * layer.parameters for layer in self.network.layers)
            macs = sum(float(layer.macs) for layer in self.network.layers)
            found = self.evaluate(self.network.folded)
            return Measured(name, size, macs, None, 0.0, found.accuracy, found.loss)
        bits = self.allocation(choice)
        size = sum(layer.parameters * bits[layer.name] / 8 for layer in self.network.layers)
        bops = sum(layer.macs * bits[layer.name] ** 2 / 32**2 for layer in self.network.layers)
        latency = problem.total("latency", choice) if "latency" in problem.costs else None
        found = self.evaluate(fake.quantized(self.network, bits, ranges))
        return Measured(
            name, size, bops, latency, problem.omega(choice), found.accuracy, found.loss
        )

    def evaluate(self, model: nn.Module) -> Evaluation:
        """On the test samples."""
        indices = self.loaded.test_indices(self.options.test_samples)
        return self.loaded.evaluate(model, self.comm, "test", indices)

    def training_loss(self, model: nn.Module) -> float:
        """On the first training samples of those that the Hessian is averaged over."""
        indices = self.loaded.training_sample(self.options.check_samples).indices
        loss = self.loaded.evaluate(model, self.comm, "train", indices).loss
        assert loss is not None
        return loss

    def check(
        self,
        found: Sequence[Sensitivity],
        problem: Problem,
        choice: Sequence[int],
        ranges: Ranges,
    ) -> Check:
        """Quantize one layer after the other alone, and random allocations of the same size."""
        from scipy.stats import spearmanr

        fewest = self.options.bits[0]
        loss = self.training_loss(self.network.folded)
        rises, quadratic = [], []
        for sensitivity in found:
            name = sensitivity.layer.name
            self.progress(f"loss with {fewest} bits in {name}")
            there, back = (
                self.training_loss(fake.shifted(self.network, name, fewest, factor)) - loss
                for factor in (1.0, -1.0)
            )
            rises.append(there)
            quadratic.append((there + back) / 2)
        omegas = [s.omega[0] for s in found]
        correlation, plain = (float(spearmanr(omegas, r).statistic) for r in (quadratic, rises))
        used = Limit("size", problem.total("size", choice), relative=False)
        losses = []
        for index, other in enumerate(random_choices(problem, used, self.options.check)):
            self.progress(f"random allocation {index + 1} of {self.options.check}")
            bits = self.allocation(other)
            losses.append(self.training_loss(fake.quantized(self.network, bits, ranges)))
        mixed = fake.quantized(self.network, self.allocation(choice), ranges)
        return Check(
            loss, tuple(rises), tuple(quadratic), correlation, plain,
            self.training_loss(mixed), tuple(losses),
        )  # fmt: skip

    def save(self, path: Path, bits: Mapping[str, int], ranges: Ranges) -> None:
        """Write the quantized network, by rank 0."""
        if self.comm.rank == 0:
            job, classes = self.loaded.job, len(self.loaded.dataset.classes)
            model = {"name": job.model.name, "arguments": job.model.arguments}
            shape = tuple(self.sample.load(0, 1)[0].shape[1:])
            stored.save(path, self.network, bits, ranges, model, shape, classes)

    def _trace(self, inputs: Any) -> Network:
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            kind = str(inputs.dtype) if isinstance(inputs, Tensor) else type(inputs).__name__
            raise UsageError(f"quantize: inputs are {kind}, expected one floating-point tensor")
        return trace(self.loaded.model, inputs)

    def _latencies(self) -> Any:
        if self.options.latencies is None:
            return None
        names = [layer.name for layer in self.layers]
        return read_latencies(self.options.latencies, names, self.options.bits)
