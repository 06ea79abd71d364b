#!/usr/bin/env bash
# Try the package with the oldest and the newest versions that pyproject.toml allows, on each Python: build the wheel,
# install it with all extras into a fresh environment, import every module of it, and run each script for a few updates.
#
#     bash tests/environments.sh [FOLDER]     PYTHONS="python3.11 python3.12" VERSIONS="oldest newest"
#
# Needs a package index. An environment takes about 6 GB in FOLDER (default: a temporary one) until its check is over.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
folder=$(realpath "${1:-$(mktemp -d)}")
export ACCELERATE_USE_CPU=true HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}

# the oldest minor version, with its fixes: >=2.11 becomes ==2.11.*
sed 's/>=\(.*\)/==\1.*/' requirements.txt > "$folder/oldest.txt"
: > "$folder/newest.txt"

check() { # PYTHON VERSIONS
    local name run
    name="$(basename "$1")-$2"
    run="$folder/$name"
    "$1" -m venv "$run"
    if [ ! -e "$folder"/*.whl ]; then
        git ls-files -z | xargs -0 cp --parents -t "$(mkdir -p "$folder/source" && echo "$folder/source")"
        "$run/bin/python" -m pip wheel --quiet --no-deps --wheel-dir "$folder" "$folder/source"
    fi
    "$run/bin/python" -m pip install --quiet --constraint "$folder/$2.txt" "$(echo "$folder"/*.whl)[all,lightning,transformers]"
    "$run/bin/python" -m pip check
    cd "$run" # not the checkout: its w2s would be imported instead of the installed one
    bin/python - <<'PYTHON'
import importlib
import pkgutil

import accelerate, diffusers, timm, torch, w2s

for module in pkgutil.walk_packages(w2s.__path__, "w2s."):
    importlib.import_module(module.name)
print(f"torch {torch.__version__}, timm {timm.__version__}, accelerate {accelerate.__version__}, "
      f"diffusers {diffusers.__version__}: every module of w2s {w2s.__version__} at {w2s.__path__[0]} imports")
PYTHON
    bin/w2s-compare --help > /dev/null
    cd "$root"
    local python="$run/bin/python"
    "$python" train_cls.py -c recipes/digits_teacher.yaml --output "$run/out" --name teacher --epochs 1
    "$python" train_cls.py -c recipes/digits_w2s.yaml --teacher "$run/out/teacher" --dry-run
    "$python" train_det.py -c recipes/digits_det_baseline.yaml --output "$run/out" --dry-run
    "$python" train_diffusion.py -c recipes/digits_diffusion_baseline.yaml --fd-features "$run/out/teacher" \
        --output "$run/out" --dry-run
    rm -r "$run"
    echo "ok: $name"
}

for python in ${PYTHONS:-python3.11 python3.12}; do
    if ! "$python" --version 2> /dev/null; then
        echo "skipped: there is no $python"
        continue
    fi
    for versions in ${VERSIONS:-oldest newest}; do
        check "$python" "$versions"
    done
done
