#!/bin/bash
# A job in one Grid Engine allocation (SGE, Son of Grid Engine, Univa, Open Cluster Scheduler):
#   qsub launch/gridengine.sh jobs/digits.toml
#   qsub launch/gridengine.sh --max-ranks 8 -- python train.py
# It starts on one rank and uses more of the allocation as it grows; slots come from $PE_HOSTFILE.
# Adapt the #$ lines, above all the name of the parallel environment, and the module line.
#$ -S /bin/bash
#$ -N hpc-absa
#$ -pe mpi 8
#$ -l h_rt=04:00:00
#$ -cwd
#$ -j y
#$ -r y
#$ -notify
set -euo pipefail

# module load gcc openmpi          # the modules that the environment was made with
# shellcheck source=/dev/null
source "${VENV:-.venv}/bin/activate"

# -notify: SIGUSR2 comes some time (the queue's `notify`) before SIGKILL; hpc-absa saves on it.
# Exit status 75: saved but not finished; the same qsub command continues.
case ${1:?usage: qsub launch/gridengine.sh JOB [OPTION]... or [OPTION]... -- COMMAND...} in
  -*) exec hpc-absa launch --launcher mpirun "$@" ;;
  *) exec hpc-absa run "$@" --launcher mpirun ;;
esac
