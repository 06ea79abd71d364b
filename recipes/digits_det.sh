#!/usr/bin/env bash
# Detection from nothing to a measured speedup: weak teachers, the student without and with them, the comparison; 3 seeds
# of RetinaNet and a pair of Faster R-CNN (FASTERRCNN_SEEDS="0 1 2" for more). Safe to run again. OUTPUT chooses another
# folder.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
output=${OUTPUT:-output}
train() { python train_det.py -c "recipes/$1.yaml" --output "$output" --seed "$2" --resume auto "${@:3}"; }

# two runs at a time, each on its half of the cores, so that their seconds compare
cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
export OMP_NUM_THREADS=$((cores > 1 ? cores / 2 : 1))
logs=$output/digits_det-logs
mkdir -p "$logs"
start() { # RECIPE SEED, and more options
    while [ "$(jobs -rp | wc -l)" -ge 2 ]; do sleep 0.2; done
    echo "$1, seed $2"
    train "$@" 2> "$logs/$1-seed$2.log" || touch "$logs/$1-seed$2.failed" &
}
stop_if_failed() {
    for failed in "$logs"/*.failed; do
        [ -e "$failed" ] || continue
        kill $(jobs -rp) 2> /dev/null || true
        wait
        tail -n 3 "${failed%.failed}.log" >&2
        rm "$logs"/*.failed
        exit 1
    done
}

start digits_det_fasterrcnn_teacher 0 # the longest of all: it goes on beside the first students
slowest=$!
start digits_det_teacher 0
wait $!
for name in digits_det digits_det_fasterrcnn; do
    seeds="0 1 2"
    if [ $name = digits_det_fasterrcnn ]; then
        seeds=${FASTERRCNN_SEEDS:-0}
        wait $slowest
    fi
    stop_if_failed
    for seed in $seeds; do
        start ${name}_baseline "$seed"
        start ${name}_w2s "$seed" --teacher "$output/${name}_teacher-seed0"
    done
done
wait
stop_if_failed
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
