#!/bin/bash
# A job in one LSF allocation:
#   JOB=jobs/digits.toml bsub -env "all" < launch/lsf.sh
#   JOB="--max-ranks 8 -- python train.py" bsub -env "all" < launch/lsf.sh
# It starts on one rank and uses more of the allocation as it grows; slots come from
# $LSB_DJOB_HOSTFILE. Adapt the #BSUB lines and the module line to your site.
#BSUB -J hpc-absa
#BSUB -n 8
#BSUB -R "span[ptile=4] affinity[core(8)]"
#BSUB -W 4:00
#BSUB -wt 2 -wa USR1
#BSUB -r
#BSUB -o hpc-absa.%J.log
set -euo pipefail

# module load gcc openmpi          # the modules that the environment was made with
# shellcheck source=/dev/null
source "${VENV:-.venv}/bin/activate"

# -wt 2 -wa USR1: the signal comes two minutes before the time is up, and hpc-absa saves on it.
# Exit status 75: saved but not finished; the same bsub command continues.
# JOB is split into words as the shell does: JOBFILE [OPTION]... or [OPTION]... -- COMMAND...
eval "set -- ${JOB:?expected JOB=jobs/digits.toml bsub ...}"
# blaunch reaches the job's other hosts where ssh is not allowed.
options=(--launcher mpirun --set launch.rsh_agent=blaunch)
case $1 in
  -*) exec hpc-absa launch "${options[@]}" "$@" ;;
  *) exec hpc-absa run "$@" "${options[@]}" ;;
esac
