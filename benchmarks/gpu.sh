#!/usr/bin/env bash
# Ten minutes on a machine with one GPU and nothing but torch, transformers, accelerate and peft: see gpu.py. Without
# a network there, the rest comes as wheels. To make them, in a checkout that is installed, with a Python of the same
# version:
#
#   pip wheel -q --no-deps -w benchmarks/wheels .
#   names='trl|datasets|bitsandbytes|pyarrow|pandas|multiprocess|dill|xxhash|jinja2|markupsafe|python-dateutil|six|psutil'
#   pip download -q --no-deps -d benchmarks/wheels $(pip freeze | grep -iE "^($names)==")
#
# (`--python-version 3.12 --only-binary :all: --platform manylinux_2_28_x86_64` for another one.) Copy `benchmarks/` to
# the machine, and
#
#   benchmarks/gpu.sh [--wheels FOLDER] [options of gpu.py]
#
# Nothing is installed there: the wheels are unpacked into a temporary folder. 50 GB of disk are needed in TMPDIR.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
wheels=$here/wheels
if [ "${1-}" = --wheels ]; then
    wheels=$2
    shift 2
fi
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
site=$temporary/site-"packages" # by this name, dill (of datasets) knows what is installed
if compgen -G "$wheels/*.whl" > /dev/null; then
    python3 -m pip install -q --no-index --no-deps --target "$site" "$wheels"/*.whl
fi
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TRL_EXPERIMENTAL_SILENCE=1
python3 "$here/gpu.py" "$@"
