#!/bin/bash
# A job in one Slurm allocation: it starts on one rank and uses more of the allocation as it grows.
#   sbatch launch/slurm.sh jobs/digits.toml
#   sbatch launch/slurm.sh --max-ranks 8 -- python train.py
# For a chain of jobs without idle nodes, run `hpc-absa run JOB --launcher slurm`
# on the login node instead. Adapt the #SBATCH lines and the module line to your site.
#SBATCH --job-name=hpc-absa
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# module load gcc openmpi          # the modules that the environment was made with
# shellcheck source=/dev/null
source "${VENV:-$SLURM_SUBMIT_DIR/.venv}/bin/activate"

# exec: the signal, two minutes before the time is up, goes to hpc-absa itself, which saves.
# Exit status 75: saved but not finished; the same sbatch command continues.
case ${1:?usage: sbatch launch/slurm.sh JOB [OPTION]... or [OPTION]... -- COMMAND...} in
  -*) exec hpc-absa launch --launcher mpirun "$@" ;;
  *) exec hpc-absa run "$@" --launcher mpirun ;;
esac
