#!/bin/sh
# abi.sh BUILT_UNDER TESTED_UNDER: builds a wheel under one version of torch, from the source archive,
# and tests it under the other. The environments are .venv-torch-VERSION. WHEEL=dist/NAME.whl tests
# that wheel instead.
set -eu
# What a change of torch could break: each op of the compiled library, autograd, modules. The libraries
# that build on it (transformers, PEFT) are not installed in these environments, and the emulator has
# a build of its own. What the kernels compute with other values is the same under any torch.
: "${ABI_TESTS:=ops/test_ops.py ops/test_autograd.py ops/test_linear.py ops/test_cpu_paths.py
  tensor/test_state_dicts.py nn/test_modules.py nn/test_shared_input.py tools/test_build.py
  docs/test_docs.py}"
builder=$PWD/.venv-torch-$1/bin/python
tester=$PWD/.venv-torch-$2/bin/python
wheels=build/abi-$1
if [ -n "${WHEEL-}" ]; then
  echo "== $WHEEL, tested under torch $2"
else
  echo "== CPU library built from the source archive under torch $1, tested under torch $2"
  rm -rf "$wheels"
  archive=$("$builder" tools/sdist.py "$wheels")
  USE_CUDA=0 "$builder" -m pip wheel -q --no-build-isolation --no-deps -w "$wheels" "$archive"
  WHEEL=$(echo "$wheels"/qlora_ext-*.whl)
fi
"$tester" -m pip install -q --no-deps --force-reinstall "$WHEEL"
for name in $ABI_TESTS; do set -- "$@" "$PWD/tests/$name"; done
shift 2
sh tools/installed.sh "$tester" -m pytest -q -n 2 --dist worksteal -m 'not slow' -k 'not simt' "$@"
