#!/bin/sh
# fuzz.sh PYTHON CASES: calls raw ops with hostile arguments, in a separate build with ASan and UBSan.
set -eu
QLORA_EXT_SANITIZE=address,undefined USE_CUDA=0 "$1" setup.py -q build_ext \
  --build-temp build/fuzz/temp --build-lib build/fuzz/lib
# Python and torch are not instrumented, so load the sanitizer's runtime before them, and the C++
# library too, or ASan would not find the function that throws. With allocator_may_return_null torch
# gets an error if it asks for too much memory, as it would without ASan.
LD_PRELOAD="$(${CXX:-g++} -print-file-name=libasan.so) $(${CXX:-g++} -print-file-name=libstdc++.so)"
ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0:detect_odr_violation=0
ASAN_OPTIONS=$ASAN_OPTIONS:allocator_may_return_null=1
export LD_PRELOAD ASAN_OPTIONS
PYTHONMALLOC=malloc OMP_NUM_THREADS=1 UBSAN_OPTIONS=print_stacktrace=1 \
  exec "$1" tests/fuzz/ops.py --library build/fuzz/lib --cases "$2"
