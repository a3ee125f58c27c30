"""`python -m hpc_absa` is the console script `hpc-absa`."""

from hpc_absa.cli import main

if __name__ == "__main__":
    main()
