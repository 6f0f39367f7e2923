#!/bin/sh
# trainers.sh PYTHON FOLDER TRAINER... [-- ARGUMENTS...]: these trainers' own command lines on our
# kernels (tests/trainers/test_command_lines.py), and a table of the runs. Each trainer goes into an
# environment of its own in FOLDER over PYTHON's packages (tests/trainers/TRAINER.txt), so that
# there is one torch and one build of ours. TRL is among PYTHON's packages.
set -eu
python=$1 folder=$2
shift 2
wanted=''
while [ $# -gt 0 ] && [ "$1" != -- ]; do wanted="$wanted $1"; shift; done
[ $# -eq 0 ] || shift

mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
for name in $wanted; do
  env=$folder/$name pins=tests/trainers/$name.txt
  if [ "$name" = trl ] || cmp -s "$pins" "$env/installed.txt"; then continue; fi
  rm -rf "$env"
  "$python" -m venv --without-pip "$env"
  site=$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  printf 'import site; site.addsitedir("%s")\n' "$packages" > "$site/zz_packages.pth"
  echo "== $name: installing"
  "$python" -m pip --python "$env/bin/python" install -q --no-deps -r "$pins"
  # LLaMA-Factory imports torchaudio, whose library needs CUDA's torch and does without.
  "$env/bin/python" -c 'import torch; raise SystemExit(not torch.version.cuda)' ||
    rm -f "$site"/torchaudio/lib/*.so
  cp "$pins" "$env/installed.txt"
done

rm -rf "$folder/results"
tests=$(echo "$wanted" | sed 's/^ *//; s/-/_/g; s/ / or /g')
failed=0
TRAINERS_FOLDER=$folder TRAINERS_RESULTS=$folder/results \
  "$python" -m pytest -q -rs -p no:cacheprovider tests/trainers/test_command_lines.py \
  -k "$tests" "$@" || failed=$?
"$python" tools/trainers_table.py "$folder/results"
exit "$failed"
