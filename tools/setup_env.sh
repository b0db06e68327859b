#!/usr/bin/env bash
# Create a virtual environment with mmasl and its dependencies. `make setup` calls this script. Environment variables:
#   PYTHON       interpreter, 3.10 to 3.12               [python3]
#   VENV         folder of the virtual environment       [.venv]
#   MMCV_WHEELS  folder with an mmcv wheel for this torch and Python, which is tried before mmcv is compiled
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}

"$PYTHON" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || {
    echo "$PYTHON is $("$PYTHON" --version 2>&1): mmasl needs Python 3.10 to 3.12. Set PYTHON, as in PYTHON=python3.11" >&2
    exit 1
}
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip "$@"; }

echo "== torch and the build dependencies of mmcv"
pip install -c constraints.txt torch torchvision numpy setuptools wheel ninja psutil packaging

# mmcv's compiled ops work with one version of torch and Python only. pip's cache ignores both, so the wheel is cached here.
key=$("$VENV/bin/python" -c 'import sys, torch
device = "cuda" if torch.cuda.is_available() else "cpu"
print(f"torch{torch.__version__}-cp{sys.version_info[0]}{sys.version_info[1]}-{device}")')
version=$(sed -n 's/^onedl-mmcv==//p' constraints.txt)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/mmasl/mmcv$version-$key
mkdir -p "$cache"

install_mmcv() {  # FOLDER: install the wheel of this folder, and check that its ops load
    compgen -G "$1/onedl_mmcv-$version-*.whl" >/dev/null &&
        pip install -c constraints.txt --no-index --find-links "$1" --force-reinstall --no-deps onedl-mmcv &&
        pip install -c constraints.txt onedl-mmcv &&
        "$VENV/bin/python" -c 'import mmcv._ext' 2>/dev/null
}

if ! install_mmcv "$cache" && ! { [ -n "${MMCV_WHEELS:-}" ] && install_mmcv "$MMCV_WHEELS"; }; then
    echo "== compiling mmcv's ops for $key, which takes 15 CPU-minutes once (log: $cache/build.log)"
    rm -f "$cache"/*.whl
    CFLAGS="${CFLAGS:--g0 -O1}" MAX_JOBS=${MAX_JOBS:-$(nproc)} MMCV_WITH_OPS=1 \
        pip wheel -v -c constraints.txt --no-build-isolation --no-deps --no-cache-dir --no-binary onedl-mmcv \
        -w "$cache" onedl-mmcv 2>&1 | tee "$cache/build.log" |
        awk 'match($0, /\[[0-9]+\/[0-9]+\]/) { printf "\r%s", substr($0, RSTART, RLENGTH); fflush() } END { print "" }' || {
        tail -n 30 "$cache/build.log" >&2
        echo "mmcv did not compile. Install a C++17 compiler and the Python headers, or see the log: $cache/build.log" >&2
        exit 1
    }
    install_mmcv "$cache"
fi

echo "== mmasl and its other dependencies"
pip install -c constraints.txt -e '.[det,cls,demo,test]'
"$VENV/bin/python" -c 'import mmasl, mmcv.ops, mmdet.models, mmpretrain.models'
touch "$VENV/.installed"
