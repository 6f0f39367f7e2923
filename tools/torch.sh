#!/bin/sh
# torch.sh PYTHON STAMP REQUIREMENT [INDEX]: installs torch and what a build needs, unless STAMP says
# that it is there. With an empty REQUIREMENT torch must be there already.
set -eu
python=$1 stamp=$2 torch=$3 index=${4-}
mkdir -p "$(dirname "$stamp")"
if [ -n "$torch" ]; then
  [ "$(cat "$stamp" 2> /dev/null)" != "$torch $index" ] || exit 0
  echo "pip install '$torch' ${index:+--index-url $index}"
  "$python" -m pip install -q "$torch" ${index:+--index-url "$index"}
else
  "$python" -c 'import torch' || {
    echo "PYTHON=$python has no torch: install it there or give TORCH= too"
    exit 1
  }
  [ ! -f "$stamp" ] || exit 0
fi
"$python" -m pip install -q 'setuptools>=77' 'pybind11>=2.12' ninja wheel packaging numpy
echo "$torch $index" > "$stamp"
