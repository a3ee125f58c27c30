#!/bin/bash
# A job on hosts given by name, without a scheduler: hosts that this one reaches by ssh without a
# password, with this folder and the environment under the same path on all of them.
#   launch/hosts.sh hosts.txt jobs/digits.toml
# hosts.txt has one host per line, the one to be filled first at the top:
#   node1 slots=4
#   node2 slots=4
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
hostfile=${1:?usage: launch/hosts.sh HOSTFILE JOB [OPTION]...}
job=${2:?usage: launch/hosts.sh HOSTFILE JOB [OPTION]...}

# shellcheck source=/dev/null
source "${VENV:-.venv}/bin/activate"

# Does every host answer, with the environment and the same time of day?
hpc-absa doctor "$job" --set "launch.hostfile=$hostfile" || exit

exec hpc-absa run "$job" --hostfile "$hostfile" "${@:3}"
