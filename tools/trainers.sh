#!/bin/sh
# trainers.sh PYTHON FOLDER TRAINER... [-- ARGUMENTS...]: these trainers' own command lines on our
# kernels (tests/trainers/test_command_lines.py), and a table of the runs. Each trainer goes into an
# environment of its own in FOLDER (tests/trainers/TRAINER.txt). TRL is among PYTHON's packages.
# `peft` stands for PEFT's own tests (tools/peft_tests.sh).
set -eu
python=$1 folder=$2
shift 2
wanted='' peft=''
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  if [ "$1" = peft ]; then peft=yes; else wanted="$wanted $1"; fi
  shift
done
[ $# -eq 0 ] || shift

mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
for name in $wanted; do
  [ "$name" != trl ] || continue
  env=$folder/$name
  sh tools/over.sh "$python" "$env" "tests/trainers/$name.txt" --no-deps
  # LLaMA-Factory imports torchaudio, whose library needs CUDA's torch and does without.
  "$env/bin/python" -c 'import torch; raise SystemExit(not torch.version.cuda)' ||
    rm -f "$env"/lib/python*/site-packages/torchaudio/lib/*.so
done

failed=0
[ -z "$peft" ] || sh tools/peft_tests.sh "$python" "$folder/peft" || failed=$?
[ -n "$wanted" ] || exit "$failed"
rm -rf "$folder/results"
tests=$(echo "$wanted" | sed 's/^ *//; s/-/_/g; s/ / or /g')
TRAINERS_FOLDER=$folder TRAINERS_RESULTS=$folder/results \
  "$python" -m pytest -q -rs -p no:cacheprovider tests/trainers/test_command_lines.py \
  -k "$tests" "$@" || failed=$?
"$python" tools/trainers_table.py "$folder/results"
exit "$failed"
