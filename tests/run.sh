#!/usr/bin/env bash
# Set up, lint, run all tests. Arguments go to pytest.
set -euo pipefail
. "$(dirname "$0")/../recipes/setup.sh" pytest ruff pycocotools
ruff check .
python -m pytest -q --durations=10 "$@"
