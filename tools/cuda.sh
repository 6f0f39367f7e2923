#!/bin/sh
# cuda.sh PYTHON NAME ARCHITECTURES: builds a wheel with the CUDA library in build/NAME, installs and
# imports it, and checks its SASS: with the tests if NAME is `cuda`, otherwise only with the data flow
# check. It needs nvcc and a CUDA torch, but no GPU.
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
if [ "$2" = cuda ]; then
  sh tools/installed.sh "$1" -m pytest -q "$PWD"/tests/tools/test_kernel_report.py \
    "$PWD"/tests/tools/test_kernel_model.py
  "$1" bench/kernel_report.py
else
  # shellcheck disable=SC2046
  "$1" bench/sass_flow.py $(sh tools/installed.sh "$1" -c 'import pathlib, qlora_ext
print(*pathlib.Path(qlora_ext.__file__).parent.glob("_C_cuda*.so"))')
fi
