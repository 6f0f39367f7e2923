#!/bin/sh
# cuda.sh PYTHON NAME ARCHITECTURES: builds a wheel with the CUDA library in build/NAME, installs it
# and imports it. It needs nvcc and a CUDA torch, but no GPU.
set -eu
command -v nvcc > /dev/null || { echo 'nvcc is not on the PATH'; exit 1; }
wheels=build/$2
rm -rf "$wheels"
USE_CUDA=1 TORCH_CUDA_ARCH_LIST=$3 "$1" -m pip wheel -q --no-build-isolation --no-deps -w "$wheels" .
"$1" -m pip install -q --no-deps --force-reinstall "$wheels"/qlora_ext-*.whl
sh tools/installed.sh "$1" -m qlora_ext
sh tools/installed.sh "$1" -c 'import qlora_ext
info = qlora_ext.build_info()
assert info["cuda_live"], info["cuda_why_not"]'
