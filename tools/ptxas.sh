#!/bin/sh
# ptxas.sh PYTHON ARGUMENTS...: reports what each ptxas makes of the 9.0a code: nvcc's, triton's, the
# last of CUDA 12, and the newest when this was written. PTXAS_NEWEST=nvidia-cuda-nvcc takes today's
# newest.
set -eu
command -v nvcc > /dev/null || { echo 'nvcc is not on the PATH'; exit 1; }
python=$1 folder=build/ptxas
shift
wanted="${PTXAS_OLDER:=nvidia-cuda-nvcc-cu12==12.9.86} ${PTXAS_NEWEST:=nvidia-cuda-nvcc==13.5.37}"
if [ "$(cat $folder/ready 2> /dev/null)" != "$wanted" ]; then
  rm -rf $folder
  "$python" -m pip install -q --no-deps --target $folder/older "$PTXAS_OLDER"
  "$python" -m pip install -q --no-deps --target $folder/newest "$PTXAS_NEWEST"
  echo "$wanted" > $folder/ready
fi
exec "$python" bench/ptxas_report.py $folder "$@"
