#!/bin/bash
# A job on hosts given by name, without a scheduler: hosts that this one reaches by ssh without a
# password, with the current folder and the environment under the same paths on all of them.
#   launch/hosts.sh hosts.txt jobs/digits.toml
#   launch/hosts.sh hosts.txt --max-ranks 8 -- python train.py
# hosts.txt has one host per line, the one to be filled first at the top:
#   node1 slots=4
#   node2 slots=4
set -euo pipefail
usage="usage: launch/hosts.sh HOSTFILE JOB [OPTION]... or HOSTFILE [OPTION]... -- COMMAND..."
hostfile=${1:?$usage}
first=${2:?$usage}
shift
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# shellcheck source=/dev/null
source "${VENV:-$project/.venv}/bin/activate"

case $first in
  -*) job=$project/jobs/digits.toml command=(launch --hostfile "$hostfile" "$@") ;;
  *) job=$first command=(run "$@" --hostfile "$hostfile") ;;
esac

# Does every host answer, with the environment and the same time of day?
hpc-absa doctor "$job" --set "launch.hostfile=$hostfile" || exit

exec hpc-absa "${command[@]}"
