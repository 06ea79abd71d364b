#!/usr/bin/env bash
# Diffusion on scikit-learn's handwritten digits: trains the classifier whose features judge the samples
# (digits_features), a weak U-Net, and 3 seeds of the strong U-Net without and with its early help, and compares them.
# Safe to run again: finished runs are skipped, interrupted ones go on. OUTPUT chooses another folder. JOBS=1 trains one
# run at a time instead of two.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
# networks this small gain nothing from bf16 on a CPU
export ACCELERATE_MIXED_PRECISION=${ACCELERATE_MIXED_PRECISION:-no}
output=${OUTPUT:-output}
train=(python train_diffusion.py --output "$output" --resume auto --fd-features "$output/digits_features-seed0" -c)

echo "The features: a ResNet-10-T that tells the digits apart"
python train_cls.py -c recipes/digits_features.yaml --output "$output" --resume auto
echo "The teacher: a U-Net of 0.18 M parameters"
"${train[@]}" recipes/digits_diffusion_teacher.yaml

echo "The student: a U-Net of 1.02 M parameters"
logs=$output/digits_diffusion
. recipes/pool.sh
for seed in 0 1 2; do
    start "baseline-seed$seed" "${train[@]}" recipes/digits_diffusion_baseline.yaml --seed $seed
    start "w2s-seed$seed" "${train[@]}" recipes/digits_diffusion_w2s.yaml --seed $seed \
        --teacher "$output/digits_diffusion_teacher-seed0"
done
finish

python -m w2s.compare --baseline "$output"/digits_diffusion_baseline-seed{0,1,2} \
    --treated "$output"/digits_diffusion_w2s-seed{0,1,2} --out "$logs"
echo "$logs/curves.png, and samples.png in each run's folder"
