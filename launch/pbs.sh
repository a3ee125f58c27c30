#!/bin/bash
# A job in one PBS allocation (OpenPBS, PBS Professional, Torque):
#   qsub -v JOB=jobs/digits.toml launch/pbs.sh
#   qsub -v JOB="--max-ranks 8 -- python train.py" launch/pbs.sh
# It starts on one rank and uses more of the allocation as it grows; slots come from $PBS_NODEFILE.
# Adapt the #PBS lines and the module line to your site.
#PBS -N hpc-absa
#PBS -l select=2:ncpus=32:mpiprocs=4:ompthreads=8
#PBS -l walltime=04:00:00
#PBS -r y
#PBS -j oe
set -euo pipefail
cd "$PBS_O_WORKDIR"

# module load gcc openmpi          # the modules that the environment was made with
# shellcheck source=/dev/null
source "${VENV:-.venv}/bin/activate"

# PBS sends SIGTERM some time before SIGKILL (the queue's kill_delay); hpc-absa saves on it.
# Exit status 75: saved but not finished; the same qsub command continues.
# JOB is split into words as the shell does: JOBFILE [OPTION]... or [OPTION]... -- COMMAND...
eval "set -- ${JOB:?expected qsub -v JOB=jobs/digits.toml launch/pbs.sh}"
case $1 in
  -*) exec hpc-absa launch --launcher mpirun "$@" ;;
  *) exec hpc-absa run "$@" --launcher mpirun ;;
esac
