# Sourced by the scripts beside it: a virtual environment with this package in it.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

# Create or reuse .venv and install the package with the given extra, when setup.py has changed.
prepare() {
    local extra="$1" python="${PYTHON:-python3}" stamp
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "Python 3.11 or newer is needed, found $("$python" --version 2>&1)." >&2
        echo "Set PYTHON to a newer one, for example PYTHON=python3.12 bash $0" >&2
        exit 2
    fi
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    stamp=".venv/.installed-${extra:-plain}-$(cksum <setup.py | cut -d' ' -f1)"
    if [ ! -e "$stamp" ]; then
        echo "installing into .venv (a few minutes the first time) ..."
        .venv/bin/python -m pip install --quiet --editable ".${extra:+[$extra]}"
        touch "$stamp"
    fi
}
