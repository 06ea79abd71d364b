#!/usr/bin/env bash
# From nothing to a measured speedup: set-up, a weak teacher, 3 seeds of the student without and with it, the comparison.
# Safe to run again: what is finished is skipped, what was interrupted goes on. OUTPUT chooses another folder.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
output=${OUTPUT:-output}
mkdir -p "$output/quickstart"
train() { python train_cls.py -c "recipes/$1.yaml" --output "$output" --seed "$2" --resume auto "${@:3}"; }

# both arms of a seed run side by side, each on its half of the cores, so that their seconds compare
cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
export OMP_NUM_THREADS=$((cores > 1 ? cores / 2 : 1))

echo "The teacher: a ResNet-10 on 300 of scikit-learn's handwritten digits"
train digits_teacher 0

for seed in 0 1 2; do
    echo "The student, a vision transformer on all of them, seed $seed: alone and with the teacher"
    train digits_baseline $seed 2> "$output/quickstart/baseline-seed$seed.log" & baseline=$!
    train digits_w2s $seed --teacher "$output/digits_teacher-seed0" 2> "$output/quickstart/w2s-seed$seed.log" & w2s=$!
    wait $baseline || { cat "$output/quickstart/baseline-seed$seed.log"; kill $w2s 2> /dev/null; exit 1; }
    wait $w2s || { cat "$output/quickstart/w2s-seed$seed.log"; exit 1; }
    tail -n 4 "$output/quickstart/baseline-seed$seed.log" "$output/quickstart/w2s-seed$seed.log" | grep -E "first@|done" || true
done

python -m w2s.compare --baseline "$output"/digits_baseline-seed{0,1,2} --treated "$output"/digits_w2s-seed{0,1,2} \
    --out "$output/quickstart"
echo "$output/quickstart/curves.png"
