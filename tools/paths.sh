#!/bin/sh
# paths.sh PYTHON ARGUMENTS...: tests again on the paths that this CPU has and would not choose.
# Without /proc/cpuinfo that is the portable path alone.
set -eu
# All that reaches the kernels, less what costs time elsewhere (compiling by torch.compile, T5).
: "${PATH_TESTS:=test_ops.py test_autograd.py test_properties.py test_bad_input.py test_modules.py
  test_linear.py test_real_weights.py test_lora.py test_shared_input.py}"
# On each path that bitsandbytes' CPU library can take. Torch and bitsandbytes see the lesser CPU as
# well there (tests/peers.py).
: "${PEER_TESTS:=test_bitsandbytes.py test_integration_bitsandbytes.py}"
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
    QLORA_EXT_CPU=$path "$python" -m pytest -q "$@"
  done
}

on 'portable avx2' "$PATH_TESTS" -m 'not slow' \
  -k 'not simt and not cuda and not compile and not t5' "$@"
on 'portable avx2 avx512' "$PEER_TESTS" -m 'not slow' "$@"
