#!/usr/bin/env bash
# How much less budget does the taught student need? Trains whole schedules of several lengths, each arm at its own best
# learning rate, and compares final quality against budget. The rate is chosen for each arm and length on seeds and
# images that are not reported: the tuning runs report on the switch split, which is training data.
#   bash recipes/budget.sh            the transformer of the quickstart, on scikit-learn's digits
# BASELINE, TREATED and TEACHER choose other recipes; BUDGETS, RATES, SEEDS and TUNING_SEEDS other lengths (in epochs),
# learning rates and seeds; OUTPUT another folder. Words after the script's name go to every run of the student. Safe to
# run again: finished runs are skipped, interrupted ones go on.
set -euo pipefail
more=("$@")
set --  # setup.sh would pass the arguments on to pip install
. "$(dirname "$0")/setup.sh"
output=${OUTPUT:-output}
baseline=${BASELINE:-recipes/budget_baseline.yaml} treated=${TREATED:-recipes/budget_w2s.yaml}
teacher=${TEACHER:-recipes/quickstart_teacher.yaml}
budgets=${BUDGETS:-6 12 24} rates=${RATES:-5e-4 1e-3 2e-3} seeds=${SEEDS:-0 1 2} tuning_seeds=${TUNING_SEEDS:-10 11}
logs=$output/budget
. recipes/pool.sh
train=(python train_cls.py --output "$logs" --resume auto ${more[@]+"${more[@]}"} -c)

student() { # ARM EPOCHS RATE SEED NAME WORDS...
    local words=("$baseline")
    [ "$1" = alone ] || words=("$treated" --teacher "$logs/teacher")
    start "$5" "${train[@]}" "${words[@]}" --epochs "$2" --lr "$3" --seed "$4" --name "$5" "${@:6}"
}

best_rate() { # ARM EPOCHS: the rate whose tuning runs end best on average
    python - "$logs" "$1" "$2" "$rates" "$tuning_seeds" << 'EOF'
import json, sys
from pathlib import Path

logs, arm, epochs, rates, seeds = sys.argv[1:]

def mean_final(rate):
    runs = [Path(logs) / f"tune-{arm}-{epochs}-{rate}-seed{seed}" for seed in seeds.split()]
    summaries = [json.loads((run / "summary.json").read_text()) for run in runs]
    ends = [summary["last"] if summary["status"] == "finished" else float("-inf") for summary in summaries]
    return sum(ends) / len(ends)

scores = {rate: mean_final(rate) for rate in rates.split()}
print(f"{arm}, {epochs} epochs: " + ", ".join(f"{rate} {score:.2f}" for rate, score in scores.items()), file=sys.stderr)
print(max(scores, key=scores.get))
EOF
}

echo "The teacher"
python train_cls.py --output "$logs" --resume auto -c "$teacher" --name teacher
echo "The learning rates, on seeds $tuning_seeds and on training data that is held out"
may_fail=3  # a rate at which the loss is no longer finite is a bad rate, and no reason to stop
for epochs in $budgets; do
    for arm in alone taught; do
        for rate in $rates; do
            for seed in $tuning_seeds; do
                student "$arm" "$epochs" "$rate" "$seed" "tune-$arm-$epochs-$rate-seed$seed" --val-split switch
            done
        done
    done
done
finish
may_fail=
echo "The runs that are reported"
for epochs in $budgets; do
    for arm in alone taught; do
        rate=$(best_rate "$arm" "$epochs")
        for seed in $seeds; do
            student "$arm" "$epochs" "$rate" "$seed" "$arm-$epochs-seed$seed"
        done
    done
done
finish

groups=()
for arm in alone taught; do
    for epochs in $budgets; do
        for seed in $seeds; do
            groups+=(--arm "$arm=$logs/$arm-$epochs-seed$seed")
        done
    done
done
python -m w2s.compare --budget "${groups[@]}" --out "$logs"
echo "$logs/budget.png"
