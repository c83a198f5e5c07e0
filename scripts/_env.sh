# shellcheck shell=bash
# Sourced by the scripts beside it: changes to the repository root, makes .venv there on first use
# from the pins in constraints.txt, and leaves it alone while what it was made from stays the same.
#
#   PYTHON         the interpreter that .venv is made with (default: python3; 3.11 or later)
#   BIREME_TORCH   the torch to install, as pip writes it (BIREME_TORCH='torch==2.11.0'), or
#                  "system" for the one that $PYTHON has already. Set it on every run or on none.
#                  Default: the CPU build where no NVIDIA driver is seen, else the CUDA build.

torch_version=2.13.0
triton_version=3.9.0 # whose interpreter runs the GPUs' kernels beside the CPU build of torch, which brings none
torch_cpu_index=https://download.pytorch.org/whl/cpu

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

die() {
  printf '%s\n' "$1" >&2
  exit 2
}

pip() {
  .venv/bin/python -m pip --disable-pip-version-check "$@"
}

has_nvidia_driver() {
  [[ -r /proc/driver/nvidia/version ]] || nvidia-smi -L >/dev/null 2>&1
}

# The requirement to install, or "system".
wanted_torch() {
  if [[ -n ${BIREME_TORCH:-} ]]; then
    echo "$BIREME_TORCH"
  elif [[ $(uname -s) != Linux ]] || has_nvidia_driver; then
    echo "torch==$torch_version"
  else
    echo "torch==$torch_version+cpu"
  fi
}

# Where .venv stands and which interpreter runs it: when this changes, .venv is made anew.
venv_identity() {
  local torch_home=own
  [[ ${BIREME_TORCH:-} != system ]] || torch_home=system
  echo "$PWD $(readlink -f .venv/bin/python) $torch_home"
}

# What .venv was filled from: when this changes, pip brings .venv up to date.
requirements_key() {
  {
    cat constraints.txt
    awk '/^\[/ { wanted = /^\[(build-system|project)/ } wanted' pyproject.toml
    echo "$torch_version $triton_version ${BIREME_TORCH:-}"
  } | cksum
}

# Sets identity, key and extras from .venv/stamp, one a line there; what is out of date is empty.
read_stamp() {
  identity='' key='' extras=''
  [[ ! -r .venv/stamp ]] || { read -r identity && read -r key && read -r extras; } <.venv/stamp || true
  [[ -x .venv/bin/python && $identity == "$(venv_identity)" ]] || identity=''
  [[ -n $identity && $key == "$(requirements_key)" ]] || extras=''
}

needs_triton() {
  [[ $1 == *+cpu && $(uname -sm) == 'Linux x86_64' ]]
}

# Sizes as measured on Linux x86-64 with Python 3.11.
announce() {
  local torch=$1 extra=$2 torch_size='' others_mb=0
  if [[ -z $extras ]]; then
    others_mb=45
    case $torch in
      system) ;;
      *+cpu) torch_size='about 190 MB for PyTorch (CPU build) and ' ;;
      "torch==$torch_version") torch_size='about 2.7 GB for PyTorch (CUDA build) and ' ;;
      *) torch_size="what $torch takes and " ;;
    esac
  fi
  case $extra in
    test)
      others_mb=$((others_mb + 77))
      ! needs_triton "$torch" || others_mb=$((others_mb + 286))
      ;;
    check) others_mb=$((others_mb + 31)) ;;
  esac
  echo "Installing what ${0##*/} needs into .venv; pip downloads, less what it has already," \
    "${torch_size}about $others_mb MB of other packages."
}

make_venv() {
  local python=${PYTHON:-python3} options=(--clear)
  command -v "$python" >/dev/null ||
    die "bireme needs Python 3.11 or later, and there is no $python here"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "bireme needs Python 3.11 or later, not $("$python" -V 2>&1); PYTHON=python3.11 $0 picks another"
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    die "$python cannot make a virtual environment here; on Debian and Ubuntu: sudo apt install python3-venv"
  [[ ${BIREME_TORCH:-} != system ]] || options+=(--system-site-packages)
  "$python" -m venv "${options[@]}" .venv
}

install_torch() {
  local torch=$1 errors
  case $torch in
    system) ;;
    *+cpu)
      # The sources that pip is set up with may offer the CPU build; if not, PyTorch's own index
      # does. The dependencies come with ours, from the usual sources.
      { errors=$(pip install --no-deps "$torch" 2>&1 >&3); } 3>&1 ||
        pip install --no-deps --index-url "$torch_cpu_index" "$torch" || {
        printf '%s\n' "$errors" >&2
        die "$torch could not be installed; BIREME_TORCH=torch==$torch_version takes whatever build pip finds"
      }
      ;;
    *) pip install --constraint constraints.txt "$torch" ;;
  esac
}

installed_torch() {
  .venv/bin/python -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' 2>/dev/null ||
    die "BIREME_TORCH=system, but ${PYTHON:-python3} has no torch"
}

fill_venv() {
  local package=. torch
  [[ $1 == core ]] || package=".[$1]"
  torch=$(wanted_torch)
  [[ -n $identity ]] || make_venv
  announce "$torch" "$1"
  install_torch "$torch"
  torch=$(installed_torch)
  pip install --quiet --constraint constraints.txt hatchling editables
  pip install --quiet --constraint constraints.txt --no-build-isolation "$torch" --editable "$package"
  if [[ $1 == test ]] && needs_triton "$torch"; then
    pip install --quiet "triton==$triton_version"
  fi
  extras=${extras:-core}
  [[ " $extras " == *" $1 "* ]] || extras+=" $1"
  printf '%s\n' "$(venv_identity)" "$(requirements_key)" "$extras" >.venv/stamp
}

# ensure_env core|EXTRA: .venv has bireme (editable), its dependencies, and those of the extra.
# One script at a time installs; another that was waiting for it looks again.
ensure_env() {
  local identity key extras
  read_stamp
  [[ " $extras " != *" $1 "* ]] || return 0
  (
    ! command -v flock >/dev/null || flock 9
    read_stamp
    [[ " $extras " == *" $1 "* ]] || fill_venv "$1"
  ) 9<constraints.txt
}
