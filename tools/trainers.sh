#!/bin/sh
# trainers.sh PYTHON FOLDER TRAINER... [-- ARGUMENTS...]: tests/trainers with these trainers, each
# in an environment of its own in FOLDER over PYTHON's packages: tests/trainers/TRAINER.txt. Prints
# a table of the runs. TRL is among PYTHON's packages.
set -eu
python=$1 folder=$2
shift 2
wanted=''
while [ $# -gt 0 ] && [ "$1" != -- ]; do wanted="$wanted $1"; shift; done
[ $# -eq 0 ] || shift

packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
for name in $wanted; do
  env=$folder/$name pins=tests/trainers/$name.txt
  if [ "$name" = trl ] || cmp -s "$pins" "$env/installed.txt"; then continue; fi
  rm -rf "$env"
  "$python" -m venv --without-pip "$env"
  site=$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  printf 'import site; site.addsitedir("%s")\n' "$packages" > "$site/zz_packages.pth"
  "$python" -m pip --python "$env/bin/python" install -q --no-deps -r "$pins"
  # LLaMA-Factory imports torchaudio, whose wheel wants CUDA's torch. It finds it does not need it.
  "$env/bin/python" -c 'import torch; torch.version.cuda or exit(1)' ||
    rm -f "$site"/torchaudio/lib/*.so
  cp "$pins" "$env/installed.txt"
done

rm -rf "$folder/results"
tests=$(echo "$wanted" | sed 's/^ *//; s/-//g; s/ \([a-z]\)/ or \1/g')
failed=0
TRAINERS=$folder TRAINERS_RESULTS=$folder/results \
  "$python" -m pytest -q -rs -p no:cacheprovider tests/trainers -k "$tests" "$@" || failed=$?
"$python" tools/trainers_table.py "$folder/results"
exit "$failed"
