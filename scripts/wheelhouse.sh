#!/usr/bin/env bash
# Collects all wheels that `scripts/setup.sh --offline DIR` needs on a machine without a network; those of fairseq and
# antlr are built here. The other machine needs the same Python version and kind of processor; no compiler.
#
#   scripts/wheelhouse.sh DIR                   for the Python that scripts/setup.sh would use
#   scripts/wheelhouse.sh --python 3.12 DIR     for another one, which must be on this machine's PATH
#   scripts/wheelhouse.sh --no-torch DIR        without torch, for a machine that has its own (setup.sh --system-torch)
#   scripts/wheelhouse.sh --minimal DIR         without the tools that tests need (setup.sh --minimal)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version=
with_torch=true
extras=fairseq,report,deepspeed,slurm,sweep,images,zstd,dev
target=

fail() { printf 'wheelhouse: %s\n' "$*" >&2; exit 1; }
usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

while (($#)); do
    case $1 in
        --python) version=${2:?--python needs a version such as 3.11}; shift ;;
        --no-torch) with_torch=false ;;
        --minimal) extras=fairseq,report ;;
        -h | --help) usage; exit 0 ;;
        -*) fail "unknown option '$1'; see scripts/wheelhouse.sh --help." ;;
        *) target=$1 ;;
    esac
    shift
done
[[ -n $target ]] || fail "give the folder for the wheels: scripts/wheelhouse.sh wheels."
mkdir -p "$target"
target=$(cd "$target" && pwd)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python=${PYTHON:-python${version:-3.11}}
"$python" -m venv "$work/venv" || fail "cannot use $python; give --python or PYTHON=/path/to/python."
pip=("$work/venv/bin/python" -m pip --disable-pip-version-check)
export PIP_CONSTRAINT=$PWD/constraints.txt PIP_BUILD_CONSTRAINT=$PWD/constraints.txt

collect() { "${pip[@]}" wheel --quiet --wheel-dir "$target" --find-links "$target" "$@"; }

# What others require as torch where torch itself is left out: an empty wheel, of a version that pip prefers.
write_empty_torch() {
    "$python" - "$work" <<'PYTHON'
import sys, zipfile
version = next(line for line in open("constraints.txt") if line.startswith("torch==")).strip()[7:] + "+empty"
info = f"torch-{version}.dist-info"
with zipfile.ZipFile(f"{sys.argv[1]}/torch-{version}-py3-none-any.whl", "w") as wheel:
    wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    wheel.writestr(f"{info}/RECORD", "")
PYTHON
}

# setup.sh builds moe_train's own editable wheel on the other machine.
collect setuptools wheel hatchling editables
printf 'wheelhouse: building fairseq\n'
collect --no-deps fairseq==0.12.2
printf 'wheelhouse: collecting what moe_train[%s] needs\n' "$extras"
$with_torch || write_empty_torch
collect --find-links "$work" ".[$extras]"
$with_torch || rm -f "$target"/torch-*+empty-*.whl
rm -f "$target"/moe_train-*.whl
printf 'wheelhouse: %d wheels, %s, in %s\n' "$(find "$target" -name '*.whl' | wc -l)" "$(du -sh "$target" | cut -f1)" "$target"
printf 'wheelhouse: on the other machine, run scripts/setup.sh --offline %s%s\n' "$(basename "$target")" "$($with_torch || printf ' --system-torch')"
