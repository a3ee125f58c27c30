"""`hpc-absa evaluate` and `hpc-absa export`: the model of a run, measured or written to a file."""

from __future__ import annotations

import json
from pathlib import Path

from hpc_absa.comm import Communicator, SerialCommunicator, raise_on_all_ranks
from hpc_absa.errors import UsageError
from hpc_absa.models.weights import write_weights
from hpc_absa.rundir.events import nan_as_none
from hpc_absa.training.data import evaluation_batch
from hpc_absa.training.evaluate import evaluate
from hpc_absa.training.load import Source, load, on_ranks, read_checkpoint
from hpc_absa.training.metrics import shown
from hpc_absa.training.setup import build_metrics


def evaluation(source: Source, as_json: bool) -> int:
    """Print loss and metrics of the test set; the entry point of one rank."""

    def command(comm: Communicator) -> int:
        loaded = load(source, comm)
        job, dataset = loaded.job, loaded.dataset
        if dataset.test is None:
            raise UsageError(f"data.name = {job.data.name!r}: it has no test set to evaluate on")
        metrics = raise_on_all_ranks(comm, lambda: build_metrics(job, dataset, loaded.loss))
        batches = loaded.loader.evaluation(comm.rank, comm.size, evaluation_batch(job, dataset))
        result = evaluate(loaded.model, loaded.loss, metrics, batches, comm)
        loaded.loader.close()
        if comm.rank:
            return 0
        if as_json:
            place = {key: loaded.attributes.get(key) for key in ("epoch", "step", "samples")}
            record = {"checkpoint": loaded.origin, "test_samples": len(dataset.test), **place}
            measured = {"loss": result.loss, "metrics": dict(result.metrics)}
            print(json.dumps(nan_as_none(record | measured)))
        else:
            words = f"{loaded.origin}: {len(dataset.test)} test samples", shown({}, result.loss)
            print(" · ".join(filter(None, words)))
            for name, value in result.metrics.items():
                print(shown({name: value}, None))
        return 0

    return on_ranks(command)


def export(path: Path, out: Path) -> str:
    """Write the parameters and buffers of a checkpoint to `out`; returns the checkpoint's name.

    Raises:
        HpcAbsaError: no good checkpoint, or `out` cannot be written.
    """
    origin, content = read_checkpoint(path, SerialCommunicator())
    write_weights(out, content.groups["model"].arrays)
    return str(origin)
