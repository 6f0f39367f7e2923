#!/bin/bash
# Everything that needs a GPU, in one command:
#
#     bench/gpu.sh OUT_DIR
#
# For a machine with nvcc, Python's headers, torch >= 2.11 for CUDA 13, transformers, and no network;
# PYTHON chooses the interpreter (default python3). In turn:
#
#   build       for this GPU, in place
#   first_call  M = 1 products in a process of their own, checked; if they die, nothing more is run
#   capture     the same, each op's first call inside a graph capture
#   parity      a tiny model trained on the CPU and the GPU; peak memory next to the estimate
#   tests       the cuda tests
#   memcheck, racecheck, initcheck, synccheck: compute-sanitizer over a small set
#   bench       bench/gpu.py
#
# Each step has a time limit, 490 seconds in all. A failed step does not stop the next one, except for
# build and first_call. The exit status is 1 if a step failed. A sanitizer that runs out of time without
# a finding has neither failed nor passed, and the summary says so.
#
# All results go to OUT_DIR, seven files at most: summary.txt, bench.json, three plots, logs.tar.gz
# with a log of each step, and while a step runs its log (four while the sanitizers run). The build
# goes to its usual places in the checkout.
#
# NOT YET RUN on a GPU; tests/tools/test_bench_gpu.py runs it with stand-ins for the tools.
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
checks=(memcheck racecheck initcheck synccheck)
# Remove the results of an earlier run, which could be mistaken for this run's.
for name in build first_call capture parity tests "${checks[@]}" bench; do rm -f "$out/$name.log"; done
rm -f "$out"/logs.tar{,.gz} "$out"/{bench.json,forward.png,forward_LoRA.png,backward_LoRA.png}
: >"$summary"
failed=0

say() { echo "$*" | tee -a "$summary"; }
indented() { sed 's/^/        /' | tee -a "$summary"; }

# A log goes into the archive as soon as its step is over: a run that is cut off has few files too.
keep() {
  tar -rf "$out/logs.tar" -C "$out" "$1.log" && rm "$out/$1.log"
}

finish() {
  [ -f "$out/logs.tar" ] && gzip -f "$out/logs.tar"
  exit "$1"
}

# limited SECONDS COMMAND...: the command's status; 124 if it ran past the limit, where timeout itself
# says 137 if it had to kill the command.
limited() {
  local limit=$1 begin=$SECONDS status
  shift
  timeout --kill-after=10 "$limit" "$@"
  status=$?
  [ $status -eq 137 ] && [ $((SECONDS - begin)) -ge "$limit" ] && status=124
  return $status
}

# how STATUS LIMIT: what a step's status means.
how() {
  if [ "$1" -eq 124 ]; then
    echo "ran past its limit of $2 s"
  elif [ "$1" -gt 128 ] && [ "$1" -le 192 ]; then
    echo "ended by signal $(kill -l $(($1 - 128)))"
  else
    echo "status $1"
  fi
}

# Lines of a log that go to the summary: parity's tables and the bench's.
shown='^\||of floor|TB/s|SM clock|^ +(MISSED|LEFT OUT) '

# step NAME SECONDS COMMAND...: the command's output goes to NAME.log, one line and what is `shown`
# to the summary.
step() {
  local name=$1 limit=$2 begin=$SECONDS status
  shift 2
  limited "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  if [ $status -eq 0 ]; then
    say "ok      $name ($((SECONDS - begin)) s)"
    grep -E "$shown" "$out/$name.log" | indented
  else
    say "FAILED  $name, $(how $status "$limit") ($((SECONDS - begin)) s); its last lines:"
    { grep -E "$shown" "$out/$name.log"; grep -vE "$shown" "$out/$name.log" | tail -n 15; } | indented
    failed=1
  fi
  # ptxas reports that it serialized wgmma as information only; for us it is a fault.
  grep -E 'C7510|C7511|wgmma.*serializ' "$out/$name.log" | sort -u | head -n 5 | indented
  keep "$name"
  return $status
}

arch=$("$python" -c '
import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + ("a" if (major, minor) == (9, 0) else ""))') || {
  say "gpu.sh: $python has no torch that sees a GPU"
  exit 1
}
headers=$("$python" -c '
import os, sys, sysconfig
folder = sysconfig.get_path("include")
print(folder)
sys.exit(not os.path.isfile(os.path.join(folder, "Python.h")))') || {
  say "gpu.sh: no Python.h in $headers, and the build needs it: install the headers of this Python" \
    "(python3-dev on Debian), or set PYTHON to an interpreter that has them"
  exit 1
}
{
  nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.sm,clocks.max.sm --format=csv,noheader
  nvcc --version | tail -n 2
  "$python" -c 'import torch; print("torch", torch.__version__)'
  git log -1 --format='commit %h %s' 2>/dev/null
} 2>&1 | tee -a "$summary"

# Unbuffered: what a step printed before it died or ran out of time is in its log.
export PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
export USE_CUDA=1 TORCH_CUDA_ARCH_LIST=$arch PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export MAX_JOBS=${MAX_JOBS:-$(nproc)}
step build 120 "$python" setup.py build_ext --inplace || finish 1
step first_call 25 "$python" bench/gpu.py --first-call || {
  say "STOPPED the first tiny call on this GPU went wrong: nothing else is run on it"
  finish 1
}
step capture 20 "$python" bench/gpu.py --first-call --in-a-graph
step parity 45 "$python" bench/parity.py
# The shared op tests' cuda backend. Without an import of transformers or peft they need little.
step tests 80 "$python" -m pytest -q --maxfail=20 -p no:cacheprovider -k 'cuda and not simt' \
  tests/ops/test_ops.py tests/ops/test_grouped.py tests/ops/test_cuda_kernels.py \
  tests/nn/test_devices.py

# Lines of compute-sanitizer that are not findings: its heading, empty lines, a count of zero, and what
# it prints when the signal at the time limit stops it.
no_finding='^=+ *$|COMPUTE-SANITIZER|(ERROR|RACECHECK) SUMMARY: 0 |process didn.t terminate|Target application'
findings() { grep -E '^=========' "$1" | grep -vE "$no_finding"; }

# One process per tool, at the same time: they are slow and use little of the GPU.
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
if [ -n "$sanitizer" ]; then
  # Check only our kernels: torch's would take the time. But initcheck must see torch's writes too.
  filter=()
  "$sanitizer" --help | grep -q -e '--kernel-name' && filter=(--kernel-name kns=qlora_ext)
  check_limit=75
  processes=()
  for tool in "${checks[@]}"; do
    # torch's allocator would hide overruns of one block into the next.
    only=("${filter[@]}")
    debug=0  # 1: zeroes what kernels count their blocks in, which may hold anything (last_block.cuh)
    [ "$tool" = initcheck ] && only=() debug=1
    (QLORA_EXT_DEBUG=$debug PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited $check_limit "$sanitizer" --tool "$tool" \
      "${only[@]}" --error-exitcode 9 \
      "$python" bench/gpu.py --touch-every-op >"$out/$tool.log" 2>&1) &
    processes+=($!)
  done
  for i in "${!processes[@]}"; do
    tool=${checks[$i]} log=$out/${checks[$i]}.log
    wait "${processes[$i]}"
    status=$?
    if [ $status -eq 0 ]; then
      say "ok      $tool"
    elif [ $status -eq 124 ] && ! findings "$log" >/dev/null; then
      reached=$(grep '^case ' "$log" | tail -n 1)
      say "TIME    $tool ran out of its $check_limit s, nothing found so far (in ${reached:-no case yet})"
    else
      say "FAILED  $tool, $(how $status $check_limit):"
      if findings "$log" >/dev/null; then findings "$log" | head -n 5; else tail -n 8 "$log"; fi | indented
      failed=1
    fi
    keep "$tool"
  done
else
  say "absent  compute-sanitizer"
fi

step bench 125 "$python" bench/gpu.py "$out" --seconds 95
if [ -s "$out/bench.json" ]; then
  gpu=$("$python" -c '
import re, torch
print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))')
  say "to keep these results: cp OUT_DIR/bench.json bench/results/$gpu-$(date -u +%F).json"
fi
finish $failed
