#!/usr/bin/env bash
# What only a GPU can tell, in one command and at most 8 minutes on an H200: builds, runs the tests that need a GPU and
# compute-sanitizer on small cases, and measures into bench/results/<device>.csv.
#
#     bench/gpu.sh               in an environment that has torch and what builds the package (README, Install)
#     bench/gpu.sh --interpret   a dry run on a CPU: everything but the build and the sanitizer, at tiny sizes
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}

if [[ ${1:-} == --interpret ]]; then
    export TRITON_INTERPRET=1 GRADNORM_BACKEND=triton
else
    $python -m pip install --quiet --no-build-isolation --no-deps .
fi

$python -P -m pytest -q -m gpu tests

if [[ ${1:-} != --interpret ]]; then
    compute-sanitizer --error-exitcode 1 \
        $python -P -m pytest -q tests/test_triton.py -k "more_rows or lookup or product_and_sum or segment_std or nan_stays"
    for tool in memcheck racecheck synccheck; do  # racecheck: of what threads share within a block
        compute-sanitizer --tool $tool --error-exitcode 1 \
            $python -P -m pytest -q tests/test_native_cuda.py -k "OnGpu and (bfloat16 or segment_std) and (ragged or SegmentStd)"
    done
fi

$python bench/run.py gpu "$@"
echo "took $SECONDS s"
