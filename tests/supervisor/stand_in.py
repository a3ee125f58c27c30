"""A user's script whose `Run` is played: it grows from 1 rank to 2 and 4, one phase a launch.

It reads and writes what the supervisor and a script's Run agree on, and needs no MPI and no torch.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from hpc_absa.rundir import RunDir
from tests.supervisor.digits import PATH, save


def main() -> None:
    run = RunDir(Path(os.environ["HPC_ABSA_RUN_DIR"]))
    ranks, limit = int(os.environ["HPC_ABSA_RANKS"]), int(os.environ["HPC_ABSA_MAX_RANKS"])
    names = [name for name in os.environ if name.startswith(("HPC_ABSA_", "OMP_"))]
    seen = {
        "ranks": ranks,
        "arguments": sys.argv[1:],
        "folder": os.getcwd(),
        "preloaded": "colorsys" in sys.modules,
        "process": Path("/proc/self/comm").read_text().strip(),
        **{name: os.environ[name] for name in names},
    }
    with open(os.environ["SEEN"], "a") as file:
        file.write(json.dumps(seen) + "\n")
    if "--no-run" in sys.argv:
        return
    if "--broken" in sys.argv:
        raise ImportError("no module of that name")
    run.joined.touch()
    if "--unwritten" in sys.argv:  # the record of the first failure: the disk was full
        launches = len(Path(os.environ["SEEN"]).read_text().splitlines())
        with run.failure.open("x") as file:
            file.write('{"reason": "no memory", "exit_code": 1}' * (launches > 1))
        sys.exit(3)
    if "--left" in sys.argv:
        return
    if "--unsaved" in sys.argv or "--refused" in sys.argv:
        os.kill(int(os.environ["SUPERVISOR"]), signal.SIGTERM)
        while not run.stop_request.exists():
            time.sleep(0.01)
        if "--refused" in sys.argv:
            record = {"reason": "the state could not be saved", "exit_code": 1, "final": True}
            run.failure.write_text(json.dumps(record))
        return
    run.write_job(PATH.read_text().replace('name = "digits"', 'name = "script"'))
    run.log.append("phase_start", ranks, ranks=ranks, global_batch=32 * ranks, step=10 * ranks)
    next_ranks = min(2 * ranks, 4, limit)
    save(run, 10 * ranks, global_batch=32 * next_ranks, next_ranks=next_ranks, rank_limit=limit)
    outcome = "resize" if next_ranks > ranks else "done"
    if "--stop" in sys.argv and ranks == 2:
        outcome = "stopped"
    run.log.append("phase_end", ranks, outcome=outcome, ranks=ranks, next_ranks=next_ranks)
    if outcome == "done":
        run.log.append("done", ranks, steps=10 * ranks, epochs=1, test_accuracy=None)
        if "--late" in sys.argv:
            sys.exit("no room for the figures")


if __name__ == "__main__":
    main()
