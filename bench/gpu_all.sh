#!/usr/bin/env bash
# All that is measured on a GPU, in parts that take some minutes each. Results go to the folder OUTPUT.
#
#     bash bench/gpu_all.sh tests|latency|startup|handoff|pipeline|vllm|sanitizer OUTPUT
set -euo pipefail
cd "$(dirname "$0")/.."
output=$2
mkdir -p "$output"

case $1 in
tests)
    python -m pytest -m cuda -n 6 -q tests | tee "$output/tests.txt"
    ;;
latency)
    for stage in qwen2.5-0.5b qwen2.5-7b llama-3.1-8b; do
        python bench/gpu_latency.py --stages "$stage" --tokens 1 8 64 256 512 2048 8192 --output "$output/$stage"
    done
    ;;
startup)
    python bench/gpu_startup.py --stage qwen2.5-7b --caches off cold warm --output "$output"
    ;;
handoff)
    python bench/gpu_handoff.py --stage qwen2.5-7b --output "$output"
    python bench/gpu_profile.py --stage qwen2.5-7b --tokens 8 --output "$output"
    ;;
pipeline)
    for model in qwen2.5-0.5b qwen2.5-7b llama-3.1-8b; do # each within ten minutes
        python bench/gpu_pipeline.py --models "$model" --check --budget-s 520 --trace-variants ours_auto_auto \
            --output "$output/$model"
    done
    ;;
vllm)
    # Needs vLLM, and this package beside it: pip install --no-deps -e . (each of these lines within ten minutes)
    python bench/gpu_vllm.py --engines default ours --output "$output"
    python bench/gpu_vllm.py --engines eager ours_pieces --add --output "$output"
    python bench/gpu_vllm.py --engines piecewise ours_kernels --add --output "$output"
    ;;
sanitizer)
    if ! command -v compute-sanitizer >/dev/null; then
        echo "compute-sanitizer is not installed here" | tee "$output/sanitizer.txt"
        exit 0
    fi
    compute-sanitizer --tool memcheck --error-exitcode 1 \
        python bench/gpu_latency.py --stages tiny --tokens 8 --methods ours --repeats 3 --output "$output/sanitized" \
        2>&1 | tee "$output/sanitizer.txt"
    # Two stages, over CUDA IPC and over NCCL.
    compute-sanitizer --tool memcheck --target-processes all --error-exitcode 1 \
        python bench/gpu_pipeline.py --models tiny --tokens 8 --in-flight 2 --quick --rounds 1 --count 4 --no-profile \
        --variants ours_full_and_piecewise --budget-s 280 --output "$output/sanitized" \
        2>&1 | tee "$output/sanitizer_pipeline.txt"
    ;;
*)
    echo "no such part: $1" >&2
    exit 2
    ;;
esac
