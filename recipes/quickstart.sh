#!/usr/bin/env bash
# From nothing to a measured speedup: installs the requirements, trains a weak teacher and 3 seeds of the student
# without and with it, and compares them.
#   bash recipes/quickstart.sh                    on scikit-learn's handwritten digits: no download, minutes on two cores
#   bash recipes/quickstart.sh cifar10 [FOLDER]   on CIFAR-10, downloaded or from a folder of its parquet files: minutes
#                                                 on a GPU, hours on two cores
# Safe to run again: finished runs are skipped, interrupted ones go on. SEEDS chooses other seeds, OUTPUT another folder.
set -euo pipefail
case ${1:-digits} in
    digits) recipe=quickstart ;;
    cifar10) recipe=cifar10_muon ;;
    *) echo "error: $1: choose digits or cifar10" >&2; exit 2 ;;
esac
more=()
if [ -n "${2:-}" ]; then
    [ "$1" = cifar10 ] || { echo "error: $1 takes no folder" >&2; exit 2; }
    [ -d "$2" ] || { echo "error: $2: no such folder" >&2; exit 2; }
    more=(--dataset "hfds/$(cd "$2" && pwd)")
fi
set --  # setup.sh would pass the arguments on to pip install
. "$(dirname "$0")/setup.sh"
output=${OUTPUT:-output} seeds=${SEEDS:-0 1 2}
logs=$output/$recipe
. recipes/pool.sh
train=(python train_cls.py --output "$output" --resume auto ${more[@]+"${more[@]}"} -c)

echo "The teacher: recipes/${recipe}_teacher.yaml"
"${train[@]}" "recipes/${recipe}_teacher.yaml"

for seed in $seeds; do
    echo "The student, seed $seed: alone and with the teacher"
    start "baseline-seed$seed" "${train[@]}" "recipes/${recipe}_baseline.yaml" --seed "$seed"
    start "w2s-seed$seed" "${train[@]}" "recipes/${recipe}_w2s.yaml" --seed "$seed" \
        --teacher "$output/${recipe}_teacher-seed0"
    finish
    tail -n 4 "$logs/baseline-seed$seed.log" "$logs/w2s-seed$seed.log" | grep -E "first@|done" || true
done

arms=()
for seed in $seeds; do
    arms+=(--arm "baseline=$output/${recipe}_baseline-seed$seed" --arm "treated=$output/${recipe}_w2s-seed$seed")
done
report=$(python -m w2s.compare "${arms[@]}" --out "$logs")
printf '%s\n\n' "$report"
head -n 1 <<< "$report"  # the verdict again, below the table
echo "$logs/curves.png"
