#!/usr/bin/env bash
# What only a GPU can tell, in four commands of at most 8 minutes each on an H200. Each builds what is not built.
#
#     bench/gpu.sh step         the answers that matter most: a training step, and the outer product at six shapes
#     bench/gpu.sh tests        the tests that need a GPU, in eight processes, which compile in parallel
#     bench/gpu.sh rest         the other figures
#     bench/gpu.sh sanitizers   compute-sanitizer on small cases, where it is allowed
#
# In an environment that has torch, pytest, hypothesis, transformers, peft and what builds the package (README, Install);
# $PYTHON is its python. Nothing is installed into it: the build goes to build/gpu. A step that fails is listed at the end,
# and the next one runs. Figures go to bench/results/<device>.csv as they are measured; where $OUT is set, they go to a
# file of that name there, with an archive of all output. With --interpret it is a dry run on a CPU, at tiny sizes, of
# everything but the build and the sanitizer.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
part=${1:-}
interpret=${2:-}
limit=480 # seconds
failures=()
logs=$PWD/build/gpu/$part
export PYTHONUNBUFFERED=1

run() { # a name, and a command: keeps its output, and notes if it fails or there is no time for it
    local name=$1 began=$SECONDS left=$((limit - SECONDS))
    shift
    if ((left < 5)); then
        failures+=("$name: not run, there was no time left")
        return 1
    fi
    echo "== $name"
    timeout --kill-after=10 $left "$@" 2>&1 | tee "$logs/$name.log"
    local status=${PIPESTATUS[0]}
    echo "== $name: $((SECONDS - began)) s, exit status $status"
    if [[ -n ${OUT:-} ]]; then
        tar -czf "$OUT/gpu-$part.tar.gz" -C build/gpu "$part"
    fi
    ((status == 0)) || failures+=("$name: exit status $status$([[ $status == 124 ]] && echo ', its time was over')")
    return "$status"
}

build() { # into a folder of its own; without native code, if that does not build
    local site=$PWD/build/gpu/site
    local install=("$python" -m pip install --quiet --no-build-isolation --no-deps --upgrade --target "$site" .)
    run build "${install[@]}" || run build_without_native env GRADNORM_NATIVE=off "${install[@]}"
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} TRITON_CACHE_DIR=$PWD/build/gpu/triton
    run versions "$python" -P -m gradnorm_ext
}

sanitize() { # a name, a tool, and what pytest is given
    local name=$1 tool=$2
    shift 2
    local command=("$python" -P -m pytest -q -p no:cacheprovider -p no:xdist "$@")
    if [[ -z $interpret ]]; then
        command=(compute-sanitizer --tool "$tool" --error-exitcode 1 "${command[@]}")
    fi
    run "$name" "${command[@]}"
}

case "$part $interpret" in
"step " | "tests " | "rest " | "sanitizers ") ;;
"step --interpret" | "tests --interpret" | "rest --interpret" | "sanitizers --interpret")
    export TRITON_INTERPRET=1 GRADNORM_BACKEND=triton
    ;;
*)
    echo "bench/gpu.sh: expected step, tests, rest or sanitizers, then --interpret or nothing, got '$*'" >&2
    exit 2
    ;;
esac
rm -rf "$logs"
mkdir -p "$logs"
[[ -n $interpret ]] || build

case $part in
step)
    for figures in meter outer step; do
        run $figures "$python" bench/run.py gpu $figures $interpret
    done
    ;;
tests)
    if [[ -n $interpret ]]; then
        few=(--processes 2 tests/test_triton_gpu.py)
    fi
    run tests "$python" bench/gpu_tests.py --logs "$logs/tests" --seconds $((limit - SECONDS - 20)) -m gpu "${few[@]:-tests}"
    ;;
rest)
    for figures in memory launch outer_rest; do
        run $figures "$python" bench/run.py gpu $figures $interpret
    done
    ;;
sanitizers)
    cases="more_rows or lookup or product_and_sum or segment_std or nan_stays"
    tools=(memcheck racecheck synccheck) # racecheck: of what threads share within a block
    if [[ -n $interpret ]]; then
        cases=nan_stays tools=(memcheck)
    fi
    sanitize triton_memcheck memcheck tests/test_triton.py -k "$cases"
    for tool in "${tools[@]}"; do
        sanitize native_$tool $tool tests/test_native_cuda.py \
            -k "OnGpu and (bfloat16 or segment_std) and (ragged or SegmentStd)"
    done
    ;;
esac

echo "took $SECONDS s"
if ((${#failures[@]} > 0)); then
    printf 'FAILED %s\n' "${failures[@]}"
    exit 1
fi
