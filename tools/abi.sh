#!/bin/sh
# abi.sh BUILT_UNDER TESTED_UNDER: builds a wheel under one version of torch, and tests it under the
# other. The environments are .venv-torch-VERSION.
set -eu
# What a change of torch could break: all that reaches the compiled library. What stands above it
# (transformers, PEFT) isn't installed in these environments; the emulator has a build of its own.
: "${ABI_TESTS:=test_ops.py test_autograd.py test_bad_input.py test_properties.py test_linear.py
  test_cpu_paths.py test_modules.py test_shared_input.py test_build.py test_docs.py}"
builder=$PWD/.venv-torch-$1/bin/python
tester=$PWD/.venv-torch-$2/bin/python
wheels=build/abi-$1
echo "== CPU library built under torch $1, tested under torch $2"
rm -rf "$wheels"
USE_CUDA=0 "$builder" -m pip wheel -q --no-build-isolation --no-deps -w "$wheels" .
"$tester" -m pip install -q --no-deps --force-reinstall "$wheels"/qlora_ext-*.whl
for name in $ABI_TESTS; do set -- "$@" "$PWD/tests/$name"; done
shift 2
sh tools/installed.sh "$tester" -m pytest -q -m 'not slow' -k 'not simt' "$@"
