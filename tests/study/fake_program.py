"""What the runner starts in its tests: `fake_program.py BEHAVIOUR run JOB --run-dir D`.

It writes the events of a run and nothing else. `BEHAVIOUR` is a JSON file: what each cell does, by
name; a cell that is not in it ends as done.
"""

import json
import os
import signal
import sys
import time
import tomllib
from pathlib import Path

from hpc_absa.rundir import RunDir
from tests.report.synthetic import Log


def finish(log: Log, accuracy: float, epochs: int) -> None:
    log.train_epoch(accuracy).save()
    log.end("done", log.step, comp=3.0, hessian=0.5)
    log.event("done", steps=log.step, epochs=epochs, test_accuracy=accuracy)


def main() -> int:
    behaviour, _, job, _, folder = sys.argv[1:6]
    run = RunDir(Path(folder)).create()
    run.write_job(Path(job).read_text())
    tables = tomllib.loads(run.job.read_text())
    behaviours = json.loads(Path(behaviour).read_text())
    action = behaviours.get(run.path.name, "done")
    starts = Path(behaviour).with_name("starts.txt")
    with starts.open("a") as file:
        file.write(f"{run.path.name} {sorted(os.sched_getaffinity(0))}\n")
    started_before = run.events.exists()
    log = Log(run.path, None)
    if action == "fail":
        print("hpc-absa: something is wrong")
        return 1
    if action == "refuse":
        return 2
    log.start()
    if action == "start" and not started_before:  # it handles no signal yet
        time.sleep(60)
    if action == "wait" and not started_before:
        signals = []
        signal.signal(signal.SIGTERM, lambda *_: signals.append(1))
        log.train_epoch(0.5).save()
        until = time.monotonic() + 60
        while not signals and time.monotonic() < until:
            time.sleep(0.01)
        log.end("stopped")
        return 75
    if action == "together":  # done once all other such cells run, too
        until = time.monotonic() + 60
        cells = {name for name, value in behaviours.items() if value == "together"}
        while not cells <= {line.split()[0] for line in starts.read_text().splitlines()}:
            if time.monotonic() > until:
                return 1
            time.sleep(0.01)
    finish(log, 0.9 + 0.02 * tables["seed"], tables["train"]["epochs"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
