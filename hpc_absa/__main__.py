"""`python -m hpc_absa` is the console script `hpc-absa`."""

import os
import sys

# `python -m` puts the current folder first, and a `random.py` there would be imported by all
# packages; `plugins.py` adds it last.
if not sys.flags.safe_path and sys.path[0] in ("", os.getcwd()):
    del sys.path[0]

from hpc_absa.cli import main

if __name__ == "__main__":
    main()
