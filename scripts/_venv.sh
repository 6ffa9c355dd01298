# Sourced by the scripts beside it: goes to the repository's root and sees to it that .venv holds the locked
# packages. Afterwards $python is the environment's interpreter. Needs python3 (3.11 or newer) with venv.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="$PWD/.venv/bin/python"

_say() { printf '%s\n' "$*" >&2; }

_find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python3.14; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  _say "Python 3.11 or newer is needed, and none was found."
  _say "  macOS: brew install python@3.12 · Debian/Ubuntu: apt-get install python3 python3-venv"
  _say "  Or name one: PYTHON=/path/to/python3.12 $0"
  return 1
}

_make_venv() {
  local base
  base="$(_find_python)"
  _say "Making .venv with $base …"
  rm -rf .venv
  if ! "$base" -m venv .venv >.venv-error.log 2>&1; then
    cat .venv-error.log >&2
    rm -rf .venv .venv-error.log
    _say "python3 cannot make a virtual environment. Debian/Ubuntu: apt-get install python3-venv"
    return 1
  fi
  rm -f .venv-error.log
}

_fingerprint() {
  "$python" -c 'import hashlib, sys
print(hashlib.sha256(b"\0".join(open(name, "rb").read() for name in sys.argv[1:])).hexdigest())' \
    requirements.lock pyproject.toml
}

_install() {
  _say "Installing the locked packages into .venv (once; a minute or two) …"
  local pip=("$python" -m pip --disable-pip-version-check -qq install)
  if ! "${pip[@]}" -r requirements.lock || ! "${pip[@]}" --no-deps -e .; then
    _say "The packages could not be installed: is the network there, and https://pypi.org reachable?"
    return 1
  fi
}

_recommend_blas() { # MLX on Linux computes with the system's BLAS: the reference one is some 20 times slower
  [ "$(uname -s)" = Linux ] && command -v ldconfig >/dev/null 2>&1 || return 0
  case "$(ldconfig -p 2>/dev/null)" in # not through a pipe: with pipefail, grep -q fails by ending early
    *libopenblas*) ;;
    *) _say "For speed on Linux: apt-get install libopenblas0-pthread (MLX computes with it)." ;;
  esac
}

_ensure_venv() {
  if ! "$python" -c 'import pip' >/dev/null 2>&1; then _make_venv; fi
  local wanted
  wanted="$(_fingerprint)"
  if [ "$(cat .venv/.radiance-stamp 2>/dev/null)" != "$wanted" ]; then
    _install
    printf '%s\n' "$wanted" >.venv/.radiance-stamp
    _recommend_blas
  fi
}

_ensure_venv
