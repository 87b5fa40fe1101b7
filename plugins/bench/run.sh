#!/usr/bin/env bash
# Builds the kernels for the GPU of this machine, checks them on it and measures them. Arguments go to each script
# (fast_hadamard.py --help lists them). Needs nvcc, CMake, Ninja and a PyTorch that sees the GPU; no TensorRT.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
"$python" -c 'import rotexport' 2>/dev/null ||
  "$python" -m pip install --quiet --no-deps --no-build-isolation --editable .
status=0
for kernel in fast_hadamard quantized_linear attention eviction; do
  "$python" "plugins/bench/$kernel.py" "$@" || status=$?
done
exit "$status"
