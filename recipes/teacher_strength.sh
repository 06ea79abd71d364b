#!/usr/bin/env bash
# How strong should the teacher be? Trains the student of recipes/digits_*.yaml alone and with teachers that were
# trained for different numbers of epochs and on different numbers of images. Then compares them, and plots the speedup
# against the gap between student and teacher.
# TEACHERS="1:300 6:300" chooses other teachers (EPOCHS:IMAGES), SEEDS="0 1 2" other seeds, and OUTPUT another folder.
# JOBS=1 trains one run at a time instead of two. Safe to run again: finished runs are skipped, interrupted ones go on.
set -euo pipefail
set --  # setup.sh would pass the arguments on to pip install
. "$(dirname "$0")/setup.sh"
output=${OUTPUT:-output} seeds=${SEEDS:-0 1 2 3 4}
teachers=${TEACHERS:-3:300 4:300 5:300 6:300 12:300 12:1000}
logs=$output/digits_strength
. recipes/pool.sh
train=(python train_cls.py --output "$output" --resume auto -c)

arms=baseline
for teacher in $teachers; do
    arm=${teacher/:/epochs-}
    echo "A teacher of ${teacher%:*} epochs, ${teacher#*:} images"
    "${train[@]}" recipes/digits_teacher.yaml --epochs "${teacher%:*}" --train-samples "${teacher#*:}" \
        --warmup-epochs 0.5 --name "digits_teacher-$arm"
    arms+=" $arm"
done
for seed in $seeds; do
    for arm in $arms; do
        words=(recipes/digits_w2s.yaml --name "digits_w2s-$arm-seed$seed" --teacher "$output/digits_teacher-$arm")
        [ "$arm" != baseline ] || words=(recipes/digits_baseline.yaml --name "digits_baseline-seed$seed")
        start "$arm-seed$seed" "${train[@]}" "${words[@]}" --seed "$seed"
    done
done
finish

groups=()
for arm in $arms; do
    for seed in $seeds; do
        name=digits_w2s-$arm
        [ "$arm" != baseline ] || name=digits_baseline
        groups+=(--arm "$arm=$output/$name-seed$seed")
    done
done
python -m w2s.compare "${groups[@]}" --strength --out "$logs"
echo "$logs/strength.png"
