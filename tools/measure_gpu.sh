#!/bin/sh
# Measures everything that docs/performance.md marks "not yet measured", on one GPU, in under 9 minutes.
# Needs torch >= 2.11, triton and timm; no DALI, no DeepSpeed (the tests of train.cuda_graph need accelerate, and skip without). Usage: sh tools/measure_gpu.sh [OUTPUT_FOLDER]
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-$root/runs/gpu}
python=${PYTHON:-python3}
mkdir -p "$out"
cd "$root" || exit 1
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TRITON_DEFAULT_FP_FUSION=1

# step NAME SECONDS COMMAND...: one measurement; a failure is said and does not stop the others.
step() {
    name=$1 seconds=$2
    shift 2
    echo "== $name"
    timeout "$seconds" "$@" >"$out/$name.log" 2>&1
    code=$?
    cat "$out/$name.log"
    [ "$code" -eq 0 ] || echo "!! $name ended with $code"
}

step gpu_tests 110 "$python" -m pytest -c /dev/null -o "markers=gpu: needs a CUDA device" --rootdir "$root" -p no:cacheprovider -q -m gpu \
    tests/kernels/test_triton_nhwc.py tests/gpu/test_step_graph_gpu.py
step norm_graph_256 60 "$python" tools/bench_norm.py --samples 256 --dtype bf16 --graph --rounds 7 --candidates unitization batchnorm \
    --parts forward backward both --json "$out/norm_graph_256.json"
step norm_graph_64 45 "$python" tools/bench_norm.py --samples 64 --dtype bf16 --graph --rounds 7 --candidates unitization batchnorm \
    --parts forward backward both --json "$out/norm_graph_64.json"
step norm_eager_256 60 "$python" tools/bench_norm.py --samples 256 --dtype bf16 --rounds 5 --shapes 4 \
    --candidates unitization unitization_compiled batchnorm batchnorm_compiled composite literal --json "$out/norm_eager_256.json"
step step_eager 90 "$python" tools/bench_step.py --batch 64 256 --rounds 3 \
    --norms unitization unitization_folded batchnorm naive timm --json "$out/step_eager.json"
step step_graph 90 "$python" tools/bench_step.py --batch 64 256 --rounds 3 --modes graph \
    --norms unitization unitization_folded batchnorm --json "$out/step_graph.json"
step step_compiled 80 "$python" tools/bench_step.py --batch 256 --rounds 3 --modes compiled \
    --norms unitization batchnorm --json "$out/step_compiled.json"
echo "results in $out"
