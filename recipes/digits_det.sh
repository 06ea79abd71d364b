#!/usr/bin/env bash
# Detection from nothing to a measured speedup: weak teachers, 3 seeds of the student without and with them, the
# comparison; for RetinaNet, then for Faster R-CNN. Safe to run again. OUTPUT chooses another folder.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
output=${OUTPUT:-output}
mkdir -p "$output"
train() { python train_det.py -c "recipes/$1.yaml" --output "$output" --seed "$2" --resume auto "${@:3}"; }

# both arms of a seed run side by side, each on its half of the cores, so that their seconds compare
cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
half=$((cores > 1 ? cores / 2 : 1))
for name in digits_det digits_det_fasterrcnn; do
    logs=$output/$name-compared
    mkdir -p "$logs"
    echo "$name: the teacher, on a ResNet-10"
    train ${name}_teacher 0
    for seed in 0 1 2; do
        echo "$name: the student, on a ResNet-26, seed $seed: alone and with the teacher"
        OMP_NUM_THREADS=$half train ${name}_baseline $seed 2> "$logs/baseline-seed$seed.log" & baseline=$!
        OMP_NUM_THREADS=$half train ${name}_w2s $seed --teacher "$output/${name}_teacher-seed0" \
            2> "$logs/w2s-seed$seed.log" & w2s=$!
        wait $baseline || { cat "$logs/baseline-seed$seed.log"; kill $w2s 2> /dev/null; exit 1; }
        wait $w2s || { cat "$logs/w2s-seed$seed.log"; exit 1; }
        tail -n 6 "$logs/baseline-seed$seed.log" "$logs/w2s-seed$seed.log" | grep -E "first@|done" || true
    done
    python -m w2s.compare --baseline "$output/${name}_baseline-seed"{0,1,2} --treated "$output/${name}_w2s-seed"{0,1,2} \
        --out "$logs"
    echo "$logs/curves.png"
done
