#!/bin/sh
# deepspeed.sh PYTHON FOLDER VERSION: runs the tests with DeepSpeed. It is installed in FOLDER, because
# transformers and accelerate behave differently if they find it in the environment.
set -eu
python=$1 folder=$2 version=$3
export DS_ACCELERATOR=cpu
if [ "$(cat "$folder/version" 2> /dev/null)" != "$version" ]; then
  rm -rf "$folder"
  # Without its requirements: pip would install a second torch into the folder.
  DS_BUILD_OPS=0 "$python" -m pip install -q --no-build-isolation --no-deps --target "$folder" "$version"
  "$python" -m pip install -q --target "$folder" einops hjson msgpack psutil py-cpuinfo pydantic
  echo "$version" > "$folder/version"
fi
export PYTHONPATH="$PWD/$folder:${PYTHONPATH-}"
"$python" -c 'import deepspeed'
"$python" -m pytest tests/distributed/test_integration_deepspeed.py
