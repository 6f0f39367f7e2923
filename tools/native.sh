#!/bin/sh
# native.sh: the CPU kernels without torch, under ASan and UBSan, on each path that this CPU has.
# native.sh emulated: the same tests on other CPUs, by qemu-user and a cross compiler, not sanitized.
set -eu
folder=build/native
mkdir -p $folder
sources=tests/native/test_cpu_kernels.cpp
for file in csrc/cpu/*.cpp csrc/cpu/simd/*.cpp; do
  [ "$file" = csrc/cpu/register.cpp ] || sources="$sources $file" # it registers the ops with torch
done
flags='-std=c++20 -ffp-contract=off'
: "${CXX:=g++}"

# run NAME COMMAND...: shows the last line, or all of it if the command fails
run() {
  log=$folder/$1.txt
  shift
  status=0
  "$@" > "$log" 2>&1 || status=$?
  tail -1 "$log"
  case $status in
    0 | 77) ;; # 77: this CPU lacks the path
    *) cat "$log"; exit 1 ;;
  esac
}

if [ "${1-}" = emulated ]; then
  aarch64-linux-gnu-g++ $flags -O2 -static $sources -pthread -o $folder/arm64
  $CXX $flags -O2 -static -Wno-unknown-pragmas $sources -pthread -o $folder/x86_64
  # arm64 and Nehalem take the portable path, Haswell the AVX2 one.
  for cpu in "qemu-aarch64 $folder/arm64" "qemu-x86_64 -cpu Nehalem $folder/x86_64" \
    "qemu-x86_64 -cpu Haswell $folder/x86_64"; do
    echo "$cpu"
    run emulated $cpu
  done
  exit
fi

program=$folder/test_cpu_kernels
if [ ! -f $program ] || [ -n "$(find csrc tests/native "$0" -newer $program -type f)" ]; then
  $CXX $flags -O1 -g -Wall -Wextra -Wno-unknown-pragmas -fno-omit-frame-pointer \
    -fsanitize=address,undefined -fno-sanitize-recover=undefined $sources -pthread -o $program
fi
for path in portable avx2 avx512 avx512_bf16; do
  run $path env QLORA_EXT_CPU=$path $program
done
