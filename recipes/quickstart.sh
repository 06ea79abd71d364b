#!/usr/bin/env bash
# From nothing to a measured speedup: installs the requirements, trains a weak teacher and 3 seeds of the student
# without and with it, and compares them. Safe to run again: finished runs are skipped, interrupted ones go on. OUTPUT
# chooses another folder.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
output=${OUTPUT:-output}
logs=$output/quickstart
. recipes/pool.sh
train=(python train_cls.py --output "$output" --resume auto -c)

echo "The teacher: a ResNet-10 on 350 of scikit-learn's handwritten digits"
"${train[@]}" recipes/quickstart_teacher.yaml

for seed in 0 1 2; do
    echo "The student, a vision transformer on 600 of them, seed $seed: alone and with the teacher"
    start "baseline-seed$seed" "${train[@]}" recipes/quickstart_baseline.yaml --seed $seed
    start "w2s-seed$seed" "${train[@]}" recipes/quickstart_w2s.yaml --seed $seed \
        --teacher "$output/quickstart_teacher-seed0"
    finish
    tail -n 4 "$logs/baseline-seed$seed.log" "$logs/w2s-seed$seed.log" | grep -E "first@|done" || true
done

python -m w2s.compare --baseline "$output"/quickstart_baseline-seed{0,1,2} \
    --treated "$output"/quickstart_w2s-seed{0,1,2} --out "$logs"
echo "$logs/curves.png"
