#!/bin/sh
# peft_tests.sh PYTHON FOLDER [-- ARGUMENTS...]: PEFT's own 4-bit tests on a CPU, on bitsandbytes,
# on QLoraExtConfig and with QLORA_EXT_ENABLE=layers (tests/trainers/peft_plugin.py), and a table.
#
#   PEFT_SOURCE=folder  take the tests from this checkout or source archive of PEFT. Without it
#                       pip gets the source archive of the installed release
#   PEFT_TESTS="..."    other files of tests
set -eu
python=$1 folder=$2
shift 2
[ "${1:-}" != -- ] || shift
: "${PEFT_TESTS:=test_quantization test_tuners_utils test_common_gpu test_gpu_examples}"

mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
here=$(pwd)
env=$folder/env
sh tools/over.sh "$python" "$env" tests/trainers/peft.txt --no-deps
release=$("$env/bin/python" -c 'from importlib.metadata import version; print(version("peft"))')
source=${PEFT_SOURCE:-$folder/peft-$release}
if [ ! -d "$source/tests" ]; then
  [ -z "${PEFT_SOURCE:-}" ] || { echo "$source has no folder tests" >&2; exit 1; }
  "$python" -m pip download -q --no-deps --no-binary :all: -d "$folder" "peft==$release" || {
    echo "pip found no source archive of PEFT $release: name a checkout of it, PEFT_SOURCE=FOLDER"
    exit 1
  } >&2
  tar -xzf "$folder/peft-$release.tar.gz" -C "$folder"
fi
rm -rf "$folder/run"
mkdir "$folder/run"
cp -R "$source/tests" "$folder/run/tests"
rm -f "$folder/run/tests/conftest.py" # it turns transformers' warnings into errors
touch "$folder/run/tests/__init__.py" # the archive lacks it

if ! cmp -s tests/trainers/peft_hub.py "$folder/hub/made.txt"; then
  rm -rf "$folder/hub"
  mkdir "$folder/hub"
  "$env/bin/python" tests/trainers/peft_hub.py "$folder/hub" > "$folder/hub.log" 2>&1
  cp tests/trainers/peft_hub.py "$folder/hub/made.txt"
fi

files=''
for name in $PEFT_TESTS; do files="$files tests/$name.py"; done
for on in stock config layers; do
  echo "== PEFT $release's tests on: $on"
  enable=''
  rm -f "$folder/$on.jsonl"
  [ "$on" != layers ] || enable=layers
  # The table judges failed tests (status 1). With a status of 2 or more pytest itself failed.
  # shellcheck disable=SC2086
  (cd "$folder/run" && \
    HF_HUB_CACHE=$folder/hub HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1 \
    QLORA_EXT_ENABLE=$enable PYTHONPATH=$here/tests/trainers:$folder/run PEFT_TESTS_ON=$on \
    PEFT_TESTS_RESULT=$folder/$on.jsonl "$env/bin/python" -m pytest -q -W ignore --tb=short \
    -p no:cacheprovider -p peft_plugin -c /dev/null --rootdir . $files "$@" \
    > "$folder/$on.log" 2>&1) || [ $? -eq 1 ] || { tail -n 30 "$folder/$on.log"; exit 1; }
  tail -n 1 "$folder/$on.log"
done
"$python" tools/peft_tests_table.py "$folder"
