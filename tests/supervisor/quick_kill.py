"""`hpc-absa` whose mpirun waits one second, not three, before and after it terminates ranks."""

from hpc_absa import cli
from hpc_absa.supervisor import launchers

if __name__ == "__main__":
    launchers.KILL_SECONDS = 1
    cli.main()
