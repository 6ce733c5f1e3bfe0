#!/usr/bin/env bash
# Every benchmark of one GPU but real training, within 9 minutes; tables go to stdout, JSON files into the folder named.
#
#     benchmarks/gpu_all.sh runs/gpu
#
# The most telling ones come first; what has not begun when the time is up is left out, and said so.
# LIMIT=120 gives less time. DEVICE=cpu SMALL=1 tries the script where there is no GPU.
set -uo pipefail
cd "$(dirname "$0")/.."

folder=${1:?name a folder for the JSON files}
device=${DEVICE:-cuda}
end=$((SECONDS + ${LIMIT:-530}))
mkdir -p "$folder"
failed=0

bench() { # name, module, arguments ...
    local name=$1 module=$2 left=$((end - SECONDS))
    shift 2
    if ((left < 15)); then
        echo "## $name: left out, the time is up"
        return
    fi
    echo "## $name"
    timeout "$left" python -m "benchmarks.$module" --device "$device" --json "$folder/$name.json" "$@" || {
        echo "## $name: failed or cut short"
        failed=1
    }
}

if [[ ${SMALL:-} ]]; then
    tokens=32 shapes="256x256" rounds=1
    models=("--layers 1 --width 64 --vocabulary 64 --context 32 --batch 1")
    largest="--width 64 --vocabulary 64 --context 32 --batch 1 --mib 10"
else
    tokens=16384 shapes="4096x4096 14336x4096" rounds=7
    models=("--model 1B --batch 16" "--model gpt2-small --batch 32" "--model 350M --batch 16")
    largest="--bf16 --width 4096 --batch 1"
fi

for block in 64 32 128 16; do
    bench "kernels-block$block" kernels --dtype bfloat16 --shapes $shapes --tokens $tokens --densities 0.2 0.1 \
        --block-size $block $block --peers auto --rounds $rounds
done
bench kernels-unstructured kernels --dtype bfloat16 --shapes $shapes --tokens $tokens --densities 0.2 0.1 \
    --peers auto reference masks --rounds $rounds
for model in "${models[@]}"; do
    words=($model)
    name=step-${words[1]}
    bench "$name-block64" step_time --bf16 $model --settings 0.2/0.4 0.1/0.2 --block-size 64 64 --rounds $rounds
    bench "$name-unstructured" step_time --bf16 $model --settings 0.2/0.4 0.1/0.2 --rounds $rounds
    bench "memory-${words[1]}" memory --bf16 $model
done
bench largest largest $largest
exit $failed
