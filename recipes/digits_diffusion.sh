#!/usr/bin/env bash
# Diffusion on scikit-learn's handwritten digits: the classifier whose features judge (digits_features), a weak
# U-Net, 3 seeds of the strong U-Net without and with its early help, the comparison.
# Safe to run again: what is finished is skipped, what was interrupted goes on. OUTPUT chooses another folder.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
output=${OUTPUT:-output}
logs="$output/digits_diffusion"
mkdir -p "$logs"
features="$output/digits_features-seed0"
train() {
    python train_diffusion.py -c "recipes/digits_diffusion_$1.yaml" --output "$output" --seed "$2" --resume auto \
        --fd-features "$features" "${@:3}"
}

echo "The features: a ResNet-10 that tells the digits apart"
python train_cls.py -c recipes/digits_features.yaml --output "$output" --resume auto
echo "The teacher: a U-Net of 0.18 M parameters"
train teacher 0

# two runs at a time, each on its half of the cores, so that their seconds compare
cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
export OMP_NUM_THREADS=$((cores > 1 ? cores / 2 : 1))
for seed in 0 1 2; do
    for arm in baseline w2s; do
        while [ "$(jobs -rp | wc -l)" -ge 2 ]; do sleep 0.2; done
        echo "The student, a U-Net of 1.02 M parameters, seed $seed, $arm"
        taught=()
        [ $arm = baseline ] || taught=(--teacher "$output/digits_diffusion_teacher-seed0")
        train $arm $seed ${taught[@]+"${taught[@]}"} 2> "$logs/$arm-seed$seed.log" || touch "$logs/$arm-seed$seed.failed" &
    done
done
wait
for failed in "$logs"/*.failed; do
    [ -e "$failed" ] || continue
    rm "$failed"
    tail -n 3 "${failed%.failed}.log" >&2
    exit 1
done

python -m w2s.compare --baseline "$output"/digits_diffusion_baseline-seed{0,1,2} \
    --treated "$output"/digits_diffusion_w2s-seed{0,1,2} --out "$logs"
echo "$logs/curves.png, and samples.png in each run's folder"
