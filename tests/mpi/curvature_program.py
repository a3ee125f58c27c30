"""Estimates on every rank of a world; rank 0 prints what all of them found, as JSON."""

import hashlib
import json
import sys

import torch

from hpc_absa.comm import Communicator, connect
from hpc_absa.curvature.estimate import estimate_eigenvalue
from hpc_absa.curvature.export import to_dict
from hpc_absa.curvature.operator import HessianOperator, evaluation_mode
from hpc_absa.curvature.spectrum import spectrum
from hpc_absa.curvature.twice import CurvatureError
from tests.curvature.architectures import distributed
from tests.curvature.nets import build


def bits(kind: str, comm: Communicator) -> list[str]:
    """A reproducible estimate in every bit; in float64, so that the order of a sum would show."""
    model, loss, sample = build(kind, dtype=torch.float64)
    found = estimate_eigenvalue(
        model, loss, sample, comm, method="lanczos", samples=22, microbatch=3, tol=1e-6,
        max_iter=40, reproducible=True, threshold=1e6,
    )  # fmt: skip
    value = found.eigenvalue
    numbers = (
        value.value, value.residual, value.error, value.sampling_error, value.upper_bound,
        found.lowest,
    )  # fmt: skip
    digest = hashlib.sha256(found.vector.numpy().tobytes()).hexdigest()
    return [*(number.hex() for number in numbers), digest]


def stratified(name: str, comm: Communicator) -> list[float]:
    """An estimate on 32 of 80 candidates: value, sampling error, bound and vector."""
    reproducible = name == "reproducible"
    model, loss, candidates = build("conv", 80, torch.float64 if reproducible else torch.float32)
    found = estimate_eigenvalue(
        model, loss, candidates.chosen(torch.arange(32)), comm, method="lanczos", samples=32,
        microbatch=8, tol=1e-6, max_iter=40, threshold=1e6, candidates=candidates,
        reproducible=reproducible,
    )  # fmt: skip
    value = found.eigenvalue
    return [value.value, value.sampling_error, value.upper_bound, *found.vector.tolist()]


def architectures(comm: Communicator) -> dict[str, list[float]]:
    """A product with the Hessian of each, in float64."""
    found = {}
    for kind in ("experts", "language", "checkpointed", "frozen", "packed"):
        model, loss, sample = distributed(kind, 22)
        with evaluation_mode(model):
            operator = HessianOperator(model, loss, sample, comm, samples=22, microbatch=5)
            found[kind] = operator.matvec(torch.ones(operator.size).double()).tolist()
    return found


def refusal(comm: Communicator) -> str:
    """Why a loss is refused that is no mean in the last microbatch, which one rank has."""
    model, _, sample = build("mlp", dtype=torch.float64)
    sample.targets[:16], sample.targets[16:] = 0, torch.tensor([0, 1] * 4)

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        weight = torch.tensor([1.0, 9.0, 1.0]).double()
        return torch.nn.functional.cross_entropy(outputs, targets, weight=weight)

    try:
        estimate_eigenvalue(
            model, loss, sample, comm, method="lanczos", samples=24, microbatch=8, tol=1e-3,
            max_iter=3,
        )  # fmt: skip
    except CurvatureError as error:
        return str(error)
    return "not refused"


def main(kinds: list[str]) -> None:
    torch.set_num_threads(1)
    comm = connect()
    found = {}
    for kind in kinds:
        model, loss, sample = build(kind, dtype=torch.float32)
        result = estimate_eigenvalue(
            model, loss, sample, comm,
            method="lanczos", samples=22, microbatch=8, tol=1e-3, max_iter=40, threshold=1e6,
        )  # fmt: skip
        digest = hashlib.sha256(result.vector.numpy().tobytes()).hexdigest()
        value = result.eigenvalue
        mine = (value.value.hex(), value.residual.hex(), value.matvecs, value.converged)
        everyone = comm.allgather_object((*mine, value.upper_bound.hex(), digest))
        found[kind] = {
            "value": value.value,
            "converged": value.converged,
            "same": len(set(everyone)) == 1,
            "vector": result.vector.tolist(),
            "sampling_error": value.sampling_error,
            "upper_bound": value.upper_bound,
        }
    found["architectures"] = architectures(comm)
    messages = set(comm.allgather_object(refusal(comm)))
    found["bits"] = {kind: bits(kind, comm) for kind in kinds}
    found["stratified"] = {
        name: list({tuple(each) for each in comm.allgather_object(stratified(name, comm))})
        for name in ("float32", "reproducible")
    }
    model, loss, sample = build("mlp", dtype=torch.float64)
    whole = spectrum(
        model, loss, sample, comm, samples=22, microbatch=8, k=2, max_iter=40,
        trace_matvecs=9, density_steps=8, density_probes=2, slice_points=3,
    )  # fmt: skip
    text = json.dumps(to_dict(whole, vectors=True))
    same = len(set(comm.allgather_object(text))) == 1
    found["spectrum"] = {"same": same, **to_dict(whole)}
    if comm.rank == 0:
        print(json.dumps({"size": comm.size, "refusals": list(messages), "found": found}))
    comm.close()


if __name__ == "__main__":
    main(sys.argv[1:])
