#!/usr/bin/env bash
# Detection from nothing to a measured speedup: weak teachers, the student without and with them, the comparison; 3 seeds
# of RetinaNet and a pair of Faster R-CNN (FASTERRCNN_SEEDS="0 1 2" for more). Safe to run again. OUTPUT chooses another
# folder.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
output=${OUTPUT:-output}
train() { python train_det.py -c "recipes/$1.yaml" --output "$output" --seed "$2" --resume auto "${@:3}"; }

# two runs side by side, each on its half of the cores, so that their seconds compare
cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
export OMP_NUM_THREADS=$((cores > 1 ? cores / 2 : 1))
logs=$output/digits_det-logs
mkdir -p "$logs"
side_by_side() { # RECIPE RECIPE SEED, and what the second one takes beside
    train "$1" "$3" 2> "$logs/$1-seed$3.log" & first=$!
    train "$2" "$3" "${@:4}" 2> "$logs/$2-seed$3.log" & second=$!
    wait $first || { cat "$logs/$1-seed$3.log"; kill $second 2> /dev/null; exit 1; }
    wait $second || { cat "$logs/$2-seed$3.log"; exit 1; }
    tail -n 6 "$logs/$1-seed$3.log" "$logs/$2-seed$3.log" | grep -E "first@|done" || true
}

echo "The teachers, on a ResNet-10: RetinaNet and Faster R-CNN"
side_by_side digits_det_teacher digits_det_fasterrcnn_teacher 0
for name in digits_det digits_det_fasterrcnn; do
    seeds="0 1 2"
    [ $name = digits_det ] || seeds=${FASTERRCNN_SEEDS:-0}
    baseline=() treated=()
    for seed in $seeds; do
        echo "$name: the student, on a ResNet-26, seed $seed: alone and with the teacher"
        side_by_side ${name}_baseline ${name}_w2s "$seed" --teacher "$output/${name}_teacher-seed0"
        baseline+=("$output/${name}_baseline-seed$seed") treated+=("$output/${name}_w2s-seed$seed")
    done
    python -m w2s.compare --baseline "${baseline[@]}" --treated "${treated[@]}" --out "$output/$name-compared"
    echo "$output/$name-compared/curves.png"
done
