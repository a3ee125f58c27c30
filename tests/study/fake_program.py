"""What the runner starts in its tests: `fake_program.py BEHAVIOUR run JOB --run-dir D`.

It leaves events as a run does, and no more: `BEHAVIOUR` says how each cell fares.
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


def finish(log: Log, accuracy: float) -> None:
    log.train_epoch(accuracy).save()
    log.end("done", log.step, comp=3.0, hessian=0.5)
    log.event("done", steps=log.step, epochs=log.epoch, test_accuracy=accuracy)


def main() -> int:
    behaviour, _, job, _, folder = sys.argv[1:6]
    run = RunDir(Path(folder)).create()
    run.write_job(Path(job).read_text())
    tables = tomllib.loads(run.job.read_text())
    told = json.loads(Path(behaviour).read_text())
    does = told.get(run.path.name, "done")
    mark = Path(behaviour).with_name("starts.txt")
    with mark.open("a") as starts:
        starts.write(f"{run.path.name} {sorted(os.sched_getaffinity(0))}\n")
    begun = run.events.exists()
    log = Log(run.path, None)
    if does == "fail":
        print("hpc-absa: something is wrong")
        return 1
    if does == "refuse":
        return 2
    log.start()
    if does == "wait" and not begun:
        asked = []
        signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
        log.train_epoch(0.5).save()
        until = time.monotonic() + 60
        while not asked and time.monotonic() < until:
            time.sleep(0.01)
        log.end("stopped")
        return 75
    if does == "meet":  # done once all others that do so are at work, too
        until = time.monotonic() + 60
        wanted = {name for name, value in told.items() if value == "meet"}
        while not wanted <= {line.split()[0] for line in mark.read_text().splitlines()}:
            if time.monotonic() > until:
                return 1
            time.sleep(0.01)
    finish(log, 0.9 + 0.02 * tables["seed"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
