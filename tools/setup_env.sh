#!/usr/bin/env bash
# Creates .venv for mmasl; `make` calls it.
#   tools/setup_env.sh cls   classification: MMPretrain, and mmcv without its compiled ops
#   tools/setup_env.sh demo  the same, and the digits of the demo, which are drawn while pip installs torch
#   tools/setup_env.sh       classification and detection: MMDetection, and mmcv with its ops
# Environment variables:
#   PYTHON       interpreter, 3.11 to 3.13        [python3]
#   VENV         folder of the environment        [.venv]
#   MMCV_WHEELS  folder with an mmcv wheel for this torch and Python, tried before compiling
set -euo pipefail
cd "$(dirname "$0")/.."
part=${1:-all}
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}

"$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || {
    echo "$PYTHON is $("$PYTHON" --version 2>&1). mmasl needs Python 3.11 to 3.13: name one with PYTHON=python3.13" >&2
    exit 1
}
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip "$@" -c constraints.txt; }
install() { pip install -q --no-compile "$@"; }  # the check at the end compiles what is used, a small part
version=$(sed -n 's/^onedl-mmcv==//p' constraints.txt)

if [ "$part" = demo ]; then
    echo "== the digits of the demo, drawn while pip installs torch"
    install numpy opencv-python rich scikit-learn
    "$VENV/bin/python" -c 'from mmasl.datasets.digits import GLYPHS, DigitScenes
GLYPHS.write("data/glyphs")
DigitScenes().write("data/digits")' &
fi
echo "== torch and torchvision (1 to 3 minutes after the download)"
install torch torchvision numpy setuptools wheel ninja psutil packaging

if [ "$part" != all ]; then
    "$VENV/bin/python" -c 'import torch._dynamo, torch.distributed.fsdp, torchvision' &  # writes their byte code
    if ! "$VENV/bin/python" -c 'import mmcv' 2>/dev/null; then
        # pip's build isolation hides torch, so mmcv leaves out its ops, which MMPretrain does not use.
        echo "== mmcv without its ops"
        install --no-cache-dir --no-binary onedl-mmcv onedl-mmcv
    fi
    echo "== MMPretrain and mmasl"
    install -e '.[cls,demo]'
    "$VENV/bin/python" -W ignore -c 'import mmasl.registry, mmpretrain.models'
    wait  # the demo draws digits that are missing
    touch "$VENV/.installed-cls"
    exit
fi

# mmcv's compiled ops fit one torch and one Python. pip's own cache knows neither, so the wheel has a cache of its own.
key=$("$VENV/bin/python" -c 'import sys, torch
device = "cuda" if torch.cuda.is_available() else "cpu"
print(f"torch{torch.__version__}-cp{sys.version_info[0]}{sys.version_info[1]}-{device}")')
cache=${XDG_CACHE_HOME:-$HOME/.cache}/mmasl/mmcv$version-$key
mkdir -p "$cache"

install_mmcv() {  # FOLDER: installs the wheel in it, if there is one, and runs an op: those of another torch may load
    compgen -G "$1/onedl_mmcv-$version-*.whl" >/dev/null &&
        install --no-index --find-links "$1" --force-reinstall --no-deps onedl-mmcv 2>/dev/null &&
        install onedl-mmcv &&
        "$VENV/bin/python" -c 'import torch; from mmcv.ops import nms; nms(torch.ones(1, 4), torch.ones(1), 0.5)' 2>/dev/null
}

show_progress() {  # reads ninja's [12/78] and prints progress with an estimate; one line in ten if not on a terminal
    local start=$SECONDS last=-1 done total line
    while IFS= read -r line; do
        [[ $line =~ \[([0-9]+)/([0-9]+)\] ]] || continue
        done=${BASH_REMATCH[1]} total=${BASH_REMATCH[2]}
        if [ -t 1 ]; then
            printf '\r  %d of %d files, about %d minutes left ' "$done" "$total" \
                $(((SECONDS - start) * (total - done) / done / 60 + 1))
        elif [ $((done * 10 / total)) -gt "$last" ]; then
            last=$((done * 10 / total))
            echo "  $done of $total files, $(((SECONDS - start) / 60)) minutes"
        fi
    done
    [ ! -t 1 ] || echo
}

compile_mmcv() {  # builds the wheel in $cache
    local source=$cache/source
    rm -rf "$cache"/*.whl "$source"
    mkdir -p "$source"
    pip download -q --no-build-isolation --no-deps --no-binary onedl-mmcv -d "$source" "onedl-mmcv==$version"
    tar -xzf "$source"/*.tar.gz -C "$source" --strip-components 1
    # torch 2.14 and newer need C++20; mmcv 2.3.6 asks for C++17.
    sed -i.orig 's/-std=c++17/-std=c++20/' "$source/setup.py"
    CFLAGS="${CFLAGS:--g0 -O1}" MAX_JOBS=${MAX_JOBS:-$(nproc)} MMCV_WITH_OPS=1 \
        pip wheel -v --no-build-isolation --no-deps --no-cache-dir -w "$cache" "$source" 2>&1 | tee "$cache/build.log" |
        show_progress
    rm -rf "$source"
}

install_any() {  # FOLDER...: installs from the first folder whose wheel loads
    local folder
    for folder; do
        if install_mmcv "$folder"; then return; fi
    done
    return 1
}

if ! install_any "$cache" ${MMCV_WHEELS:+"$MMCV_WHEELS"/*/ "$MMCV_WHEELS"}; then
    echo "== mmcv's ops for $key, compiled once: about 8 minutes on 2 idle cores (log: $cache/build.log)"
    compile_mmcv || {
        tail -n 30 "$cache/build.log" >&2
        echo "mmcv did not compile. It needs a C++20 compiler and the Python headers; the log is $cache/build.log" >&2
        exit 1
    }
    install_mmcv "$cache"
fi

echo "== MMDetection, MMPretrain and mmasl"
install -e '.[det,cls,demo,test]'
"$VENV/bin/python" -W ignore -c 'import mmasl.registry, mmcv.ops, mmdet.models, mmpretrain.models'
touch "$VENV/.installed-cls" "$VENV/.installed"
