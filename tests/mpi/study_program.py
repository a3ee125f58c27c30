"""attack, quantize, analyse, AdaHessian's diagonal and the curvature by layer, on every rank.

Rank 0 prints the results.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from hpc_absa.adversarial.robustness import Options as Attacks
from hpc_absa.comm import Communicator, connect
from hpc_absa.curvature.export import to_dict
from hpc_absa.quantization.result import as_dict
from hpc_absa.training import analyse, quantize
from hpc_absa.training.adahessian import AdaHessian, StepDiagonal
from hpc_absa.training.attack import attack_model
from hpc_absa.training.layer_curvature import LayerCurvature
from hpc_absa.training.load import Loaded, Source, load

ATTACKS = Attacks(("fgsm", "pgd", "tr-l2-easy"), 50, (16.0,), radius=0.05, iterations=20)


def diagonals(loaded: Loaded, comm: Communicator) -> dict[str, float]:
    """Sums of the absolute diagonal of a step of 5 microbatches, summed as they come and in order.

    With as many terms as parameters, a difference in any of them shows.
    """
    found = {}
    for reproducible in (False, True):
        model = loaded.model.train()
        optimizer = AdaHessian(model.parameters(), seed=3)
        step = StepDiagonal(
            model, loaded.loss, loaded.loader, comm, loaded.stream.microbatch, reproducible
        )
        step.estimate(optimizer, range(4, 9))
        values = torch.cat([optimizer.state[p]["hessian_diagonal"].reshape(-1)
                            for p in optimizer.parameters])  # fmt: skip
        weights = torch.from_numpy(np.random.default_rng(0).random(len(values)))
        found["reproducible" if reproducible else "plain"] = float(values.double() @ weights)
    model.eval()
    return found


def results(checkpoint: Path, comm: Communicator) -> dict[str, object]:
    loaded = load(Source(checkpoint), comm)
    torch.set_num_threads(1)
    robustness, _ = attack_model(loaded, comm, ATTACKS)
    options = quantize.Options(samples=24, matvecs=6, check=2)
    quantized = quantize.Quantizer(loaded, comm, options).run(None)
    study = analyse.Options(samples=24, trace_matvecs=6, density_steps=4, surface=2)
    point = analyse.measure(loaded, comm, "run", study, ATTACKS, lambda part: None)
    layers = LayerCurvature(
        loaded.model, loaded.loss, loaded.training_sample(24), comm,
        microbatch=loaded.stream.microbatch, reproducible=False,
    )  # fmt: skip
    found = {
        "attack": [to_dict(r) for r in robustness.results],
        "quantize": as_dict(quantized),
        "analyse": {k: v for k, v in point.items() if k != "seconds"},
        "diagonal": diagonals(loaded, comm),
        "layers": {measure: layers.of(measure, 0) for measure in ("trace", "eigenvalue")},
    }
    for result in found["attack"]:
        del result["seconds_per_sample"]
    return found


def main(checkpoint: str) -> None:
    comm = connect()
    found = results(Path(checkpoint), comm)
    everyone = comm.allgather_object(json.dumps(found))
    if comm.rank == 0:
        print(json.dumps({"size": comm.size, "same": len(set(everyone)) == 1, "found": found}))
    comm.close()


if __name__ == "__main__":
    main(sys.argv[1])
