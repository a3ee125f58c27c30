"""Continuing a run from its newest good checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from hpc_absa import config
from hpc_absa.checkpoint import CheckpointManager, Key
from hpc_absa.checkpoint.restore import Header, newest_good
from hpc_absa.comm import Communicator, raise_on_all_ranks
from hpc_absa.config import Job
from hpc_absa.errors import UsageError
from hpc_absa.progress import Progress, SampleStream
from hpc_absa.rundir import RunDir
from hpc_absa.rundir.events import Event
from hpc_absa.training.state import TrainState, require_same_model


def resume(
    job: Job,
    data_digest: str,
    manager: CheckpointManager,
    comm: Communicator,
    state: TrainState,
    stream: SampleStream,
    allow_changed: tuple[str, ...],
) -> str | None:
    """Restore the newest good checkpoint into `state`; its name, None without any."""
    memory: dict[Key, Tensor] = {}
    former = job

    def accept(header: Header) -> Mapping[Key, Tensor]:
        nonlocal former
        former = _require_same_job(job, data_digest, header, allow_changed)
        shapes = {name: p.shape for (group, name), p in header.places.items() if group == "model"}
        require_same_model(state.model, shapes, header.path.name)
        memory.clear()
        memory.update(state.memory(header.places))
        return memory

    restored = newest_good(manager, comm, accept)
    if restored is None:
        return None
    if comm.rank == 0:
        for damaged in restored.damaged:
            print(f"skipped a damaged checkpoint: {damaged}", flush=True)
    name = restored.path.name
    raise_on_all_ranks(comm, lambda: state.restore(restored.content, name, memory))
    state.progress = _continued(state.progress, former, job, stream)
    return name


def _continued(progress: Progress, former: Job, job: Job, stream: SampleStream) -> Progress:
    """With the learning rate and the decision points of `job`, where these may differ."""
    if job.train.lr != former.train.lr:  # that of the state is a multiple of the former one
        lr = progress.schedule.lr * job.train.lr / former.train.lr
        progress = replace(progress, schedule=replace(progress.schedule, lr=lr))
    if job.hessian.every != former.hessian.every:  # boundaries are counted
        before = replace(stream, every=former.hessian.every or stream.samples)
        passed = stream.passed(before, progress.position)
        progress = replace(progress, position=replace(progress.position, boundary=passed))
    return progress


def _require_same_job(
    job: Job, data_digest: str, header: Header, allow_changed: tuple[str, ...]
) -> Job:
    """Refuse a checkpoint from which this job could not continue with the same result; its job."""
    content, path = header.scalars, str(header.path)
    saved = config.parse(str(content.groups["job"].attributes["text"]), path, warn=False)
    config.refuse_changes(saved, job, path, allow_changed)
    digest = content.groups["data"].attributes["digest"]
    if digest != data_digest:
        raise UsageError(
            f"{path}: of another data set: {digest}, not {data_digest}; expected the same data, "
            "another --run-dir, or --fresh to start over"
        )
    return saved


def previous_end(directory: RunDir) -> Event | None:
    """How the launch before ended: its `phase_end`, if it continues with more ranks, or failure.

    None where a launch after it has taken a step, or it has stopped.
    """
    last = directory.log.last("phase_end", "failure", "resize", "restart")
    if last is None or last["event"] in ("resize", "restart"):
        return None
    if last["event"] == "phase_end" and last.get("outcome") != "resize":
        return None
    return last if isinstance(last.get("time"), int | float) else None
