#!/usr/bin/env bash
# Detection, from nothing to a measured speedup: trains weak teachers and the students without and with them, for 3
# seeds of RetinaNet and one pair of Faster R-CNN (FASTERRCNN_SEEDS="0 1 2" for more), and compares them. Safe to run
# again: finished runs are skipped, interrupted ones go on. OUTPUT chooses another folder. JOBS=1 trains one run at a
# time instead of two.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
# networks this small gain nothing from bf16 on a CPU
export ACCELERATE_MIXED_PRECISION=${ACCELERATE_MIXED_PRECISION:-no}
output=${OUTPUT:-output}
logs=$output/digits_det-logs
. recipes/pool.sh
train() { # RECIPE SEED [OPTIONS]
    start "$1-seed$2" python train_det.py -c "recipes/$1.yaml" --output "$output" --seed "$2" --resume auto "${@:3}"
}

train digits_det_fasterrcnn_teacher 0 # the longest run, so it goes on while the first students are trained
train digits_det_teacher 0
finish digits_det_teacher-seed0
for name in digits_det digits_det_fasterrcnn; do
    seeds="0 1 2"
    if [ $name = digits_det_fasterrcnn ]; then
        seeds=${FASTERRCNN_SEEDS:-0}
        finish digits_det_fasterrcnn_teacher-seed0
    fi
    for seed in $seeds; do
        train ${name}_baseline "$seed"
        train ${name}_w2s "$seed" --teacher "$output/${name}_teacher-seed0"
    done
done
finish
for name in digits_det digits_det_fasterrcnn; do
    seeds="0 1 2"
    [ $name = digits_det ] || seeds=${FASTERRCNN_SEEDS:-0}
    baseline=() treated=()
    for seed in $seeds; do
        baseline+=("$output/${name}_baseline-seed$seed") treated+=("$output/${name}_w2s-seed$seed")
    done
    python -m w2s.compare --baseline "${baseline[@]}" --treated "${treated[@]}" --out "$output/$name-compared"
    echo "$output/$name-compared/curves.png"
done
