"""A rank that shows its surroundings, then ends as its arguments say."""

import json
import os
import signal
import sys
import time

if __name__ == "__main__":
    mask = os.umask(0)
    os.umask(mask)
    names = [name for name in os.environ if name.startswith(("OMPI_", "TEST_"))]
    surroundings = {
        "argv": sys.argv[1:],
        "name": __name__,
        "folder": os.getcwd(),
        "path": sys.path[0],
        "mask": mask,
        "cores": sorted(os.sched_getaffinity(0)),
        "environment": {name: os.environ[name] for name in sorted(names)},
        "signals": [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)],
        "standard input": sys.stdin.read(),
    }
    print(json.dumps(surroundings), flush=True)
    print(os.getpid(), file=sys.stderr, flush=True)
    match sys.argv[1]:
        case "raise":
            raise ArithmeticError("on purpose")
        case "exit":
            sys.exit(int(sys.argv[2]))
        case "signal":
            os.kill(os.getpid(), int(sys.argv[2]))
        case "handle":
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(7))
            print("ready", file=sys.stderr, flush=True)
    time.sleep(60 * (sys.argv[1] in ("wait", "handle")))
