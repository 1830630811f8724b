#!/usr/bin/env bash
# Everything that needs a GPU, in one run without a network: build, self-check, tests, graphs,
# compute-sanitizer, benchmarks. With --dry-run, everything of it that needs none.
#
#   benchmarks/gpu_check.sh [--quick] [--dry-run] [--minutes N] [--out DIR]
#
# PYTHON (default python3) needs a torch with CUDA, setuptools, ninja and pytest; nothing is installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m gpu.check "$@"
