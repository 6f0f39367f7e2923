#!/bin/sh
# paths.sh PYTHON ARGUMENTS...: runs tests again on the paths that this CPU has but would not choose.
# Without /proc/cpuinfo that is only the portable path.
set -eu
# What the kernels compute, less what costs time elsewhere (torch.compile, T5) or is the same on
# every path (opcheck: schemas and fakes; checks of arguments; modules).
: "${PATH_TESTS:=ops/test_ops.py ops/test_autograd.py ops/test_properties.py ops/test_scaling.py
  ops/test_linear.py ops/test_real_weights.py ops/test_grouped.py ops/test_grouped_autograd.py}"
# Run on each path that bitsandbytes' CPU library can take. There torch and bitsandbytes see the lesser
# CPU too (tests/support/peers.py).
: "${PEER_TESTS:=tensor/test_bitsandbytes.py integrations/test_integration_bitsandbytes.py}"
: "${PEER_PATHS:=portable avx2 avx512}"
python=$1
shift

# on PATHS TESTS ARGUMENTS...: runs these tests on each of these paths that the CPU has
on() {
  paths=$1 tests=$2
  shift 2
  for name in $tests; do set -- "$@" "tests/$name"; done
  for path in $paths; do
    case $path in
      avx512) flag=avx512_bf16 ;;
      *) flag=$path ;;
    esac
    [ "$path" = portable ] || grep -q -w "$flag" /proc/cpuinfo 2> /dev/null || continue
    echo "== QLORA_EXT_CPU=$path: $tests"
    QLORA_EXT_CPU=$path "$python" -m pytest -q -n 2 --dist worksteal "$@"
  done
}

on 'portable avx2' "$PATH_TESTS" -m 'not slow' \
  -k 'not simt and not cuda and not compile and not opcheck and not t5' "$@"
on "$PEER_PATHS" "$PEER_TESTS" -m 'not slow' "$@"
