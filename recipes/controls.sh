#!/usr/bin/env bash
# Is it the teacher's knowledge that makes the student faster? Trains the student alone (baseline), with the teacher
# (w2s), with each --kd-control in the teacher's place, and with other rules for ending the distillation (never, fixed).
# Then compares all of them.
#     bash recipes/controls.sh                          5 seeds of scikit-learn's digits
#     bash recipes/controls.sh cifar10 [OPTIONS]        the recipes cifar10_cpu_*; OPTIONS go to train_cls.py in all runs,
#                                                       e.g. --dataset hfds/FOLDER
# SEEDS="0 1 2" chooses other seeds, and OUTPUT another folder. Two runs are trained side by side, so their seconds can
# only be compared with each other; JOBS=1 trains one at a time. Safe to run again: finished runs are skipped,
# interrupted ones go on.
set -euo pipefail
data=${1:-digits}
options=("${@:2}")
set --  # setup.sh would pass the arguments on to pip install
. "$(dirname "$0")/setup.sh"
case $data in
    digits) base=digits fixed=8 short= ;;
    cifar10) base=cifar10_cpu fixed=3 short=4 ;;  # its rate falls to 0, so a short schedule is another baseline
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

groups=()  # only the seeds asked for, even if the folder has others
for arm in $arms; do
    for seed in $seeds; do
        [ "$arm" = short ] || groups+=(--arm "$arm=$output/${base}_$arm-seed$seed")
    done
done
python -m w2s.compare "${groups[@]}" --out "$logs"
if [ -n "$short" ]; then  # short has another schedule and grid, so it is compared separately, with --allow
    groups=()
    for arm in baseline w2s short; do
        for seed in $seeds; do groups+=(--arm "$arm=$output/${base}_$arm-seed$seed"); done
    done
    python -m w2s.compare "${groups[@]}" --allow epochs grid --out "$logs/short"
fi
echo "$logs/report.html"
