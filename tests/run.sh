#!/usr/bin/env bash
# Set up, lint, run all tests, a file on each core. Arguments go to pytest.
set -euo pipefail
. "$(dirname "$0")/../recipes/setup.sh" build pytest pytest-xdist ruff "setuptools>=77" \
    ipykernel lightning nbclient pycocotools trackio transformers wandb-workspaces
ruff check .
ruff format --check .
python -m pytest -q --durations=10 --numprocesses logical --maxprocesses 8 --dist loadfile "$@"
