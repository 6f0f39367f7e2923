#!/bin/sh
# trainers.sh PYTHON FOLDER TRAINER... [-- ARGUMENTS...]: tests these trainers on our kernels. Each gets
# an environment of its own in FOLDER (tests/trainers/TRAINER.txt), except TRL, which is among PYTHON's
# packages. Trainers with a command line run through tests/trainers/test_command_lines.py, which
# leaves a table of the runs; lightning, litgpt and torchtune have tests of their own, and so has
# `gguf`, the converter for merged models. `peft` stands for PEFT's own tests (tools/peft_tests.sh).
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
  # LLaMA-Factory imports torchaudio, whose library needs a CUDA torch. Without it the import works.
  "$env/bin/python" -c 'import torch; raise SystemExit(not torch.version.cuda)' ||
    rm -f "$env"/lib/python*/site-packages/torchaudio/lib/*.so
done

rm -rf "$folder/results"
export TRAINERS_RESULTS="$folder/results"
failed=0 commands=''
[ -z "$peft" ] || sh tools/peft_tests.sh "$python" "$folder/peft" || failed=$?
for name in $wanted; do
  own=tests/trainers/test_$name.py
  case $name in
    torchtune) own="$own tests/trainers/test_foreign_adapters.py" ;;
    gguf | lightning | litgpt) ;;
    *) commands="$commands $name" && continue ;;
  esac
  echo "== $name"
  # shellcheck disable=SC2086
  "$folder/$name/bin/python" -m pytest -q -rs -p no:cacheprovider $own "$@" || failed=$?
done
if [ -n "$commands" ]; then
  tests=$(echo "$commands" | sed 's/^ *//; s/-/_/g; s/ / or /g')
  TRAINERS_FOLDER=$folder "$python" -m pytest -q -rs -p no:cacheprovider \
    tests/trainers/test_command_lines.py -k "$tests" "$@" || failed=$?
fi
[ ! -d "$folder/results" ] || "$python" tools/trainers_table.py "$folder/results"
exit "$failed"
