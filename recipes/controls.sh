#!/usr/bin/env bash
# Is it what the teacher knows that makes the student faster? The student of the quickstart alone (baseline), taught (w2s),
# with each --kd-control in the teacher's place, and with other ends of distillation (never, fixed); then the comparison.
#     bash recipes/controls.sh                          5 seeds of scikit-learn's digits
#     bash recipes/controls.sh cifar10 [OPTIONS]        the recipes cifar10_cpu_*; OPTIONS go to train_cls.py in all runs,
#                                                       e.g. --dataset hfds/FOLDER
# SEEDS="0 1 2" takes other seeds, JOBS=1 one run at a time (2 side by side, so that their seconds compare only among
# themselves), OUTPUT another folder. Safe to run again: what is finished is skipped, what was interrupted goes on.
set -euo pipefail
data=${1:-digits}
options=("${@:2}")
set --  # setup.sh would install its arguments
. "$(dirname "$0")/setup.sh"
case $data in
    digits) base=digits fixed=8 short= ;;
    cifar10) base=cifar10_cpu fixed=3 short=4 ;;  # its learning rate falls to 0: a short schedule is another baseline
    *) echo "error: digits or cifar10, not $data" >&2; exit 2 ;;
esac
output=${OUTPUT:-output} seeds=${SEEDS:-0 1 2 3 4}
arms="baseline w2s shuffled uniform labels random never fixed ${short:+short}"
logs=$output/${base}_controls
. recipes/pool.sh

train() {  # ARM SEED
    local recipe=${base}_w2s words=(--teacher "$output/${base}_teacher-seed0")
    case $1 in
        baseline) recipe=${base}_baseline words=() ;;
        short) recipe=${base}_baseline words=(--epochs "$short") ;;
        w2s) ;;
        never) words+=(--kd-off never) ;;
        fixed) words+=(--kd-off "$fixed") ;;
        *) words+=(--kd-control "$1") ;;
    esac
    start "$1-seed$2" python train_cls.py -c "recipes/$recipe.yaml" --output "$output" --name "${base}_$1-seed$2" \
        --seed "$2" --resume auto ${words[@]+"${words[@]}"} ${options[@]+"${options[@]}"}
}

echo "The teacher"
python train_cls.py -c "recipes/${base}_teacher.yaml" --output "$output" --resume auto ${options[@]+"${options[@]}"}
for seed in $seeds; do
    for arm in $arms; do
        train "$arm" "$seed"
    done
done
finish

groups=()  # of the seeds asked for, whatever else there is
for arm in $arms; do
    for seed in $seeds; do
        [ "$arm" = short ] || groups+=(--arm "$arm=$output/${base}_$arm-seed$seed")
    done
done
python -m w2s.compare "${groups[@]}" --out "$logs"
if [ -n "$short" ]; then  # another length is another schedule and another grid: compared by leave, and apart
    groups=()
    for arm in baseline w2s short; do
        for seed in $seeds; do groups+=(--arm "$arm=$output/${base}_$arm-seed$seed"); done
    done
    python -m w2s.compare "${groups[@]}" --allow epochs grid --out "$logs/short"
fi
echo "$logs/report.html"
