#!/usr/bin/env bash
# How strong should the teacher be? The student of the quickstart alone, and taught by teachers of other lengths of training
# and numbers of images; then the comparison, with speedup against the gap between student and teacher.
# TEACHERS="1:300 6:300" takes other teachers (EPOCHS:IMAGES), SEEDS="0 1 2" other seeds, JOBS=1 one run at a time (2),
# OUTPUT another folder. Safe to run again: what is finished is skipped, what was interrupted goes on.
set -euo pipefail
set --  # setup.sh would install its arguments
. "$(dirname "$0")/setup.sh"
output=${OUTPUT:-output} seeds=${SEEDS:-0 1 2 3 4} jobs=${JOBS:-2}
teachers=${TEACHERS:-1:300 2:300 3:300 6:300 12:300 12:1000}
compared=$output/digits_strength
mkdir -p "$compared"
cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
export OMP_NUM_THREADS=$((cores > jobs ? cores / jobs : 1))
train() { python train_cls.py -c "recipes/$1.yaml" --output "$output" --resume auto "${@:2}"; }

arms=baseline
for teacher in $teachers; do
    arm=${teacher/:/epochs-}
    echo "A teacher of ${teacher%:*} epochs, ${teacher#*:} images"
    train digits_teacher --epochs "${teacher%:*}" --train-samples "${teacher#*:}" --warmup-epochs 0.5 \
        --name "digits_teacher-$arm"
    arms+=" $arm"
done
for seed in $seeds; do
    for arm in $arms; do
        while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do sleep 0.2; done
        echo "$arm, seed $seed"
        words=(digits_w2s --name "digits_w2s-$arm-seed$seed" --teacher "$output/digits_teacher-$arm")
        [ "$arm" != baseline ] || words=(digits_baseline --name "digits_baseline-seed$seed")
        train "${words[@]}" --seed "$seed" 2> "$compared/$arm-seed$seed.log" || touch "$compared/$arm-seed$seed.failed" &
    done
done
wait
for failed in "$compared"/*.failed; do
    [ -e "$failed" ] || continue
    rm "$failed"
    tail -n 3 "${failed%.failed}.log" >&2
    exit 1
done

groups=()
for arm in $arms; do
    for seed in $seeds; do
        name=digits_w2s-$arm
        [ "$arm" != baseline ] || name=digits_baseline
        groups+=(--arm "$arm=$output/$name-seed$seed")
    done
done
python -m w2s.compare "${groups[@]}" --strength --out "$compared"
echo "$compared/strength.png"
