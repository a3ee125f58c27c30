"""Runs benchmarks one after the other: `python -m benchmarks [NAME ...] [--quick]`.

Each folder with a `__main__.py` is a benchmark; its results are in `benchmarks/results/NAME.md`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAMES = sorted(path.parent.name for path in HERE.glob("*/__main__.py"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)}; all")
    parser.add_argument("--quick", action="store_true", help="a reduced version, ten minutes")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in NAMES]:
        parser.error(f"{unknown[0]}: expected {', '.join(NAMES)}")
    ends = []
    for name in options.names or NAMES:
        begin = time.monotonic()
        print(f"######## {name}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}", *["--quick"][: options.quick]]
        status = subprocess.run(command, cwd=HERE.parent).returncode
        end = "done" if status == 0 else f"exit status {status}"
        ends.append(f"{name}: {end} after {time.monotonic() - begin:.0f} s")
    print("########", *ends, sep="\n")
    sys.exit(any(": done" not in end for end in ends))


if __name__ == "__main__":
    main()
