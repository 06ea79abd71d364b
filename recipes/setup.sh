# Sourced by the scripts in recipes/ and by tests/run.sh: installs requirements.txt and the packages in "$@", unless
# that has been done already. Makes .venv in the repository if no environment is active. PYTHON chooses the interpreter
# (3.11 or newer).
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; then
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv || exit 1
    . .venv/bin/activate
fi
if ! python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: Python 3.11 or newer is needed, this is $(python --version); set PYTHON" >&2
    exit 1
fi
wanted="$(cat requirements.txt | cksum) $*"
if [ "$(cat "$(python -c 'import sys; print(sys.prefix)')/.w2s-installed" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing requirements (once; PyTorch is several GB) ..."
    python -m pip install --quiet --disable-pip-version-check -r requirements.txt "$@" || exit 1
    echo "$wanted" > "$(python -c 'import sys; print(sys.prefix)')/.w2s-installed"
fi
