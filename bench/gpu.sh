#!/bin/bash
# Everything that needs a GPU, in one command: builds for this GPU, runs the cuda tests, runs
# compute-sanitizer on a small set, benches.
#
#     bench/gpu.sh OUT_DIR
#
# For a machine with nvcc, torch >= 2.11 for CUDA 13 and no network; PYTHON chooses the interpreter
# (default python3). Each step has a limit, 485 seconds together, and a step that fails does not stop
# the next, but for the build. OUT_DIR receives a log of each step, summary.txt, bench.json and the
# plots; bench.json goes to bench/results/<gpu>-<date>.json as well. Ends with 1 if a step failed.
#
# NOT YET RUN: written and syntax-checked on a machine without a GPU.
set -u
cd "$(dirname "$0")/.."
if [ $# -ne 1 ]; then
  echo "usage: bench/gpu.sh OUT_DIR" >&2
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
python=${PYTHON:-python3}
summary=$out/summary.txt
: >"$summary"
failed=0

# step NAME SECONDS COMMAND...: the command's output goes to NAME.log, one line to the summary.
step() {
  local name=$1 limit=$2 begin=$SECONDS status
  shift 2
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  if [ $status -eq 0 ]; then
    echo "ok      $name ($((SECONDS - begin)) s)" | tee -a "$summary"
  else
    [ $status -eq 124 ] && echo "ran past its limit of $limit s" >>"$out/$name.log"
    echo "FAILED  $name, status $status ($((SECONDS - begin)) s); its last lines:" | tee -a "$summary"
    tail -n 15 "$out/$name.log" | sed 's/^/        /' | tee -a "$summary"
    failed=1
  fi
  return $status
}

arch=$("$python" -c '
import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + ("a" if (major, minor) == (9, 0) else ""))') || {
  echo "gpu.sh: $python has no torch that sees a GPU" | tee -a "$summary"
  exit 1
}
{
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
  nvcc --version | tail -n 2
  "$python" -c 'import torch; print("torch", torch.__version__)'
  git log -1 --format='commit %h %s' 2>/dev/null
} 2>&1 | tee -a "$summary"

export USE_CUDA=1 TORCH_CUDA_ARCH_LIST=$arch PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export MAX_JOBS=${MAX_JOBS:-$(nproc)}
step build 120 "$python" setup.py build_ext --inplace || exit 1
step info 30 "$python" -c '
import qlora_ext, sys
info = qlora_ext.build_info()
print(*(f"{key}: {value}" for key, value in info.items()), sep="\n")
sys.exit(None if info["cuda_live"] else "the CUDA half is not live")' || exit 1
# The shared op tests' cuda backend. Without an import of transformers or peft they need little.
step tests 90 "$python" -m pytest -q --maxfail=20 -p no:cacheprovider -k 'cuda and not simt' \
  tests/test_ops.py tests/test_cuda_kernels.py tests/test_devices.py

# One process per tool, at the same time: they are slow and use little of the GPU.
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
if [ -n "$sanitizer" ]; then
  # Our kernels alone: torch's need no check and take the time. initcheck must see their writes too.
  filter=()
  "$sanitizer" --help | grep -q -e '--kernel-name' && filter=(--kernel-name kns=qlora_ext)
  names=() processes=()
  for tool in memcheck racecheck initcheck synccheck; do
    # torch's allocator would hide overruns of one block into the next.
    only=("${filter[@]}")
    [ "$tool" = initcheck ] && only=()
    (PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout --kill-after=10 75 "$sanitizer" --tool "$tool" \
      "${only[@]}" --error-exitcode 9 \
      "$python" bench/gpu.py --touch-every-op >"$out/$tool.log" 2>&1) &
    processes+=($!)
    names+=("$tool")
  done
  for i in "${!processes[@]}"; do
    if wait "${processes[$i]}"; then
      echo "ok      ${names[$i]}" | tee -a "$summary"
    else
      echo "FAILED  ${names[$i]}; see ${names[$i]}.log:" | tee -a "$summary"
      grep -m 5 -E "=========" "$out/${names[$i]}.log" | sed 's/^/        /' | tee -a "$summary"
      failed=1
    fi
  done
else
  echo "absent  compute-sanitizer" | tee -a "$summary"
fi

step bench 170 "$python" bench/gpu.py "$out" --seconds 130
if [ -s "$out/bench.json" ]; then
  gpu=$("$python" -c '
import re, torch
print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))')
  mkdir -p bench/results
  cp "$out/bench.json" "bench/results/$gpu-$(date -u +%F).json"
  echo "results bench/results/$gpu-$(date -u +%F).json" | tee -a "$summary"
fi
grep -E "of floor|TB/s" "$out/bench.log" | tee -a "$summary"
exit $failed
