#!/usr/bin/env bash
# Makes .venv in the checkout and installs moe_train, fairseq and what they need. Quick when nothing has changed.
#
#   scripts/setup.sh                 everything, with the tools that tests need
#   scripts/setup.sh --minimal       what training, evaluation and reports need
#   scripts/setup.sh --offline DIR   from the wheels in DIR (scripts/wheelhouse.sh collects them), without a network
#   scripts/setup.sh --system-torch  use the torch that $PYTHON already has, such as a cluster's own build
#
# PYTHON names the interpreter (3.11 or 3.12); otherwise the newest of them on PATH is taken, 3.11 first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly VENV=.venv
readonly STAMP="$VENV/.ready"
readonly TORCH=torch==2.13.0
readonly FAIRSEQ=fairseq==0.12.2
readonly MINIMAL_EXTRAS=fairseq,report
readonly FULL_EXTRAS=fairseq,report,deepspeed,slurm,sweep,dev

extras=$FULL_EXTRAS
wheelhouse=
system_torch=false

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }
usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

parse_arguments() {
    while (($#)); do
        case $1 in
            --minimal) extras=$MINIMAL_EXTRAS ;;
            --offline)
                [[ -d ${2:-} ]] || fail "--offline needs a folder of wheels; make one with scripts/wheelhouse.sh."
                wheelhouse=$(cd "$2" && pwd)
                shift
                ;;
            --system-torch) system_torch=true ;;
            -h | --help) usage; exit 0 ;;
            *) fail "unknown option '$1'; see scripts/setup.sh --help." ;;
        esac
        shift
    done
}

# The caller's Python and pip settings must not reach the installation, apart from where packages come from.
forget_environment() {
    unset PYTHONPATH PYTHONHOME VIRTUAL_ENV PIP_CONSTRAINT PIP_BUILD_CONSTRAINT PIP_REQUIREMENT PIP_NO_BUILD_ISOLATION \
        PIP_USER PIP_TARGET PIP_PREFIX PIP_ROOT PIP_NO_DEPS PIP_NO_BINARY PIP_ONLY_BINARY PIP_PRE PIP_REQUIRE_VIRTUALENV \
        PIP_UPGRADE PIP_EDITABLE PIP_DRY_RUN PIP_IGNORE_INSTALLED PIP_FORCE_REINSTALL
}

usable_python() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null
}

find_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        usable_python "$PYTHON" || fail "PYTHON=$PYTHON is not Python 3.11 or 3.12."
        printf '%s' "$PYTHON"
        return
    fi
    for candidate in python3.11 python3.12 python3; do
        if usable_python "$candidate"; then
            printf '%s' "$candidate"
            return
        fi
    done
    fail "needs Python 3.11 or 3.12: on Debian or Ubuntu 'apt-get install python3 python3-venv python3-dev'," \
        "or name one: PYTHON=/path/to/python3.11 scripts/setup.sh."
}

# What was installed from; the settings of ruff, mypy and pytest do not count.
fingerprint() {
    {
        printf '%s\n' "$TORCH" "$FAIRSEQ" "$1" "$system_torch" "$PWD"
        "$VENV/bin/python" -c '
import sys, tomllib
settings = tomllib.load(open("pyproject.toml", "rb"))
print(sys.version, settings["build-system"], settings["project"], settings["tool"]["hatch"])'
        cat constraints.txt
    } | sha256sum | cut -d' ' -f1
}

# A full environment also serves a minimal call.
is_ready() {
    local known
    [[ -f $STAMP && -x $VENV/bin/python ]] || return 1
    known=$(<"$STAMP")
    [[ $known == "$(fingerprint "$extras")" || $known == "$(fingerprint "$FULL_EXTRAS")" ]]
}

# fairseq has no wheel for Python 3.11: pip compiles it.
need_compiler() {
    command -v "${CXX:-g++}" >/dev/null && return
    if [[ $EUID -eq 0 ]] && command -v apt-get >/dev/null; then
        say "installing g++, which fairseq's build needs"
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq g++ >/dev/null && return
    fi
    fail "fairseq's build needs a C++ compiler: 'sudo apt-get install g++', or 'sudo dnf install gcc-c++'."
}

make_venv() {
    local python=$1 flags=(--clear)
    $system_torch && flags+=(--system-site-packages)
    say "making $VENV with $("$python" --version)"
    "$python" -m venv "${flags[@]}" "$VENV" ||
        fail "could not make $VENV; on Debian or Ubuntu 'apt-get install python3-venv' provides what is missing."
}

install() {
    local pip=("$VENV/bin/python" -m pip --disable-pip-version-check)
    local options=(--quiet --progress-bar off)
    # pip hands PIP_CONSTRAINT to isolated builds too: fairseq's asks for torch in an open range, several GB of CUDA.
    export PIP_CONSTRAINT=$PWD/constraints.txt PIP_BUILD_CONSTRAINT=$PWD/constraints.txt
    [[ -n $wheelhouse ]] && options+=(--no-index --find-links "$wheelhouse")
    if ! $system_torch; then
        say "installing $TORCH"
        "${pip[@]}" install "${options[@]}" "$TORCH"
    fi
    say "installing moe_train[$extras]"
    "${pip[@]}" install "${options[@]}" --editable ".[$extras]"
    # Last and without its pins, which ask for the Hydra of 2020 (`pip check` complains about that for ever).
    say "building and installing $FAIRSEQ (about a minute)"
    "${pip[@]}" install "${options[@]}" --no-deps "$FAIRSEQ"
}

main() {
    parse_arguments "$@"
    forget_environment
    if is_ready; then
        say "$VENV is up to date"
        return
    fi
    local python started=$SECONDS
    python=$(find_python)
    [[ -n $wheelhouse ]] || need_compiler
    [[ -x $VENV/bin/python ]] || make_venv "$python"
    rm -f "$STAMP"
    install
    fingerprint "$extras" >"$STAMP"
    say "ready in $((SECONDS - started)) s; 'source $VENV/bin/activate' puts moe-train and its companions on PATH"
}

main "$@"
