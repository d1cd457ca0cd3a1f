#!/usr/bin/env bash
# Makes .venv in the checkout and installs moe_train, fairseq and their dependencies. Fast when nothing has changed.
#
#   scripts/setup.sh                 everything, with the tools that tests need
#   scripts/setup.sh --minimal       what training, evaluation and reports need
#   scripts/setup.sh --offline DIR   from the wheels in DIR (scripts/wheelhouse.sh collects them), without a network
#   scripts/setup.sh --system-torch  use the torch that $PYTHON already has, such as a cluster's own build (also where that
#                                    Python is a virtual environment's)
#
# PYTHON sets the interpreter (3.11 or 3.12); default: one on PATH, 3.11 first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly VENV=.venv
readonly STAMP="$VENV/.ready"
readonly TORCH=torch==2.13.0
readonly FAIRSEQ=fairseq==0.12.2
readonly MINIMAL_EXTRAS=fairseq,report
readonly FULL_EXTRAS=fairseq,report,deepspeed,slurm,sweep,images,serve,zstd,dev

extras=$FULL_EXTRAS
wheelhouse=
system_torch=false
python=

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

# The caller's Python and pip settings must not affect the installation, except for package indexes.
forget_environment() {
    unset PYTHONPATH PYTHONHOME VIRTUAL_ENV PIP_CONSTRAINT PIP_BUILD_CONSTRAINT PIP_REQUIREMENT PIP_NO_BUILD_ISOLATION \
        PIP_USER PIP_TARGET PIP_PREFIX PIP_ROOT PIP_NO_DEPS PIP_NO_BINARY PIP_ONLY_BINARY PIP_PRE PIP_REQUIRE_VIRTUALENV \
        PIP_UPGRADE PIP_EDITABLE PIP_DRY_RUN PIP_IGNORE_INSTALLED PIP_FORCE_REINSTALL
}

may_use_apt() { [[ $EUID -eq 0 ]] && command -v apt-get >/dev/null; }

apt_install() {
    say "installing $* with apt-get"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

usable_python() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null
}

first_usable_python() {
    local candidate
    for candidate in python3.11 python3.12 python3; do
        if usable_python "$candidate"; then
            python=$candidate
            return
        fi
    done
    return 1
}

find_python() {
    if [[ -n ${PYTHON:-} ]]; then
        usable_python "$PYTHON" || fail "PYTHON=$PYTHON is not Python 3.11 or 3.12."
        python=$PYTHON
    elif ! first_usable_python; then
        { may_use_apt && apt_install python3 && first_usable_python; } ||
            fail "needs Python 3.11 or 3.12; set one: PYTHON=/path/to/python3.11 scripts/setup.sh."
    fi
}

# fairseq and antlr have no wheels: they are compiled with Python's headers. Debian has packages of their own for these
# and for venv.
need_system_packages() {
    local version missing=()
    version=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    "$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=("$version-venv")
    if [[ -z $wheelhouse ]]; then
        "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || missing+=("$version-dev")
        command -v "${CXX:-g++}" >/dev/null || missing+=(g++)
    fi
    if ((${#missing[@]} == 0)); then return; fi
    if [[ -z ${CXX:-} ]] && may_use_apt && apt_install "${missing[@]}"; then return; fi
    fail "${missing[*]} missing: fairseq's build needs a C++ compiler (${CXX:-g++}) and Python's headers." \
        "On Debian or Ubuntu: 'sudo apt-get install ${missing[*]}'."
}

# Checksum of the inputs of the installation, without settings of ruff, mypy and pytest.
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

# Whether the environment has the Python version of PYTHON, and with --system-torch uses its packages.
is_as_asked() {
    local version='import sys; print(sys.version)'
    if [[ -n ${PYTHON:-} && "$("$PYTHON" -c "$version" 2>&1)" != "$("$VENV/bin/python" -c "$version")" ]]; then return 1; fi
    if ! $system_torch; then return; fi
    grep -q '^include-system-site-packages = true' "$VENV/pyvenv.cfg" || return 1
    [[ -z ${PYTHON:-} || "$(packages_of_environment "$PYTHON")" == "$(cat "$VENV"/lib/python*/site-packages/outer.pth 2>/dev/null)" ]]
}

sees_torch() { "$VENV/bin/python" -c 'from importlib.metadata import version; version("torch")' 2>/dev/null; }

# Package folders of a virtual environment, one per line, given its Python; nothing for another Python.
packages_of_environment() {
    "$1" -c 'import sys, sysconfig
if sys.prefix != sys.base_prefix:
    print(*dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib")), sep="\n")'
}

# A full environment is also ready for a minimal call.
is_ready() {
    local known
    [[ -f $STAMP && -x $VENV/bin/python ]] && is_as_asked || return 1
    known=$(<"$STAMP")
    [[ $known == "$(fingerprint "$extras")" || $known == "$(fingerprint "$FULL_EXTRAS")" ]]
}

make_venv() {
    local flags=()
    if $system_torch; then flags+=(--system-site-packages); fi
    say "making $VENV with $("$python" --version)"
    "$python" -m venv --clear "${flags[@]}" "$VENV"
    if $system_torch; then see_outer_packages; fi
}

# If $python belongs to a virtual environment, --system-site-packages gives access to the packages of its base Python, not to
# its own: those are added after ours.
see_outer_packages() {
    local outer
    outer=$(packages_of_environment "$python")
    if [[ -n $outer ]]; then
        printf '%s\n' "$outer" >"$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
    fi
}

# Writes the pins. With --system-torch, torch is pinned to the installed version, and its dependencies are not pinned: pip
# keeps the installed ones, while an isolated build, which gets the same pins, may need other versions.
write_constraints() {
    cp constraints.txt "$VENV/constraints.txt"
    if ! $system_torch; then return; fi
    "$VENV/bin/python" - "$VENV/constraints.txt" <<'PYTHON' || fail "--system-torch: $python has no torch."
import re, sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

def name(requirement):
    return re.sub(r"[._-]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()

versions, wanted = {}, ["torch"]
while wanted:
    package = wanted.pop()
    if package not in versions:
        try:
            found = distribution(package)
        except PackageNotFoundError:  # for another system
            continue
        versions[package] = found.version
        wanted += [name(line) for line in found.requires or () if not re.search(r"\bextra\s*==", line)]
if "torch" not in versions:
    sys.exit(1)
pins = Path(sys.argv[1])
kept = [line for line in pins.read_text(encoding="utf-8").splitlines() if not line[:1].isalnum() or name(line) not in versions]
pins.write_text("\n".join([*kept, f"torch=={versions['torch']}"]) + "\n", encoding="utf-8")
PYTHON
}

install() {
    local pip=("$VENV/bin/python" -m pip --disable-pip-version-check) options=()
    [[ -t 1 ]] || options+=(--quiet)
    # pip passes PIP_CONSTRAINT to isolated builds, too, where an open range of torch could download several GB.
    export PIP_CONSTRAINT=$PWD/$VENV/constraints.txt PIP_BUILD_CONSTRAINT=$PWD/$VENV/constraints.txt
    if [[ -n $wheelhouse ]]; then
        unset PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS
        export PIP_CONFIG_FILE=/dev/null
        options+=(--no-index --find-links "$wheelhouse")
    fi
    if ! $system_torch; then
        say "installing $TORCH"
        "${pip[@]}" install "${options[@]}" "$TORCH"
    fi
    say "installing moe_train[$extras]"
    "${pip[@]}" install "${options[@]}" --editable ".[$extras]"
    # Last and without its dependencies, which pin Hydra to a version of 2020 (`pip check` reports that).
    say "installing $FAIRSEQ"
    "${pip[@]}" install "${options[@]}" --no-deps "$FAIRSEQ"
}

main() {
    parse_arguments "$@"
    forget_environment
    if is_ready; then
        say "$VENV is up to date"
        return
    fi
    local started=$SECONDS
    find_python
    need_system_packages
    # An environment without torch was made by a Python that had none.
    if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || ! is_as_asked || { $system_torch && ! sees_torch; }; then
        make_venv
    fi
    rm -f "$STAMP"
    write_constraints
    install
    fingerprint "$extras" >"$STAMP.new" && mv "$STAMP.new" "$STAMP"
    say "ready in $((SECONDS - started)) s; 'source $VENV/bin/activate' puts moe-train and the other commands on PATH"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then main "$@"; fi
