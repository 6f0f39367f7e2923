#!/bin/sh
# versions.sh PYTHON FOLDER SET... [-- ARGUMENTS...]: the tests of the integrations under each of
# these sets of releases, tests/versions/SET.txt. Each set goes into an environment of its own in
# FOLDER, over PYTHON's packages, so that there is one torch and one build of ours.
set -eu
python=$1 folder=$2
shift 2
: "${VERSION_TESTS:=tests/integrations tests/adapters tests/merging tests/cli}"
sets=''
while [ $# -gt 0 ] && [ "$1" != -- ]; do sets="$sets $1"; shift; done
[ $# -eq 0 ] || shift
# Without an option the longer suites stay out.
[ $# -gt 0 ] || set -- -m 'not slow' -n 2 --dist worksteal

packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
failed=''
table='set transformers PEFT TRL accelerate result'
for name in $sets; do
  env=$folder/$name wanted=tests/versions/$name.txt
  if ! cmp -s "$wanted" "$env/installed.txt"; then
    rm -rf "$env"
    "$python" -m venv --without-pip "$env"
    # addsitedir and not a plain path: the link to the checkout is a .pth file among the packages.
    site=$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    printf 'import site; site.addsitedir("%s")\n' "$packages" > "$site/zz_packages.pth"
    "$python" -m pip --python "$env/bin/python" install -q -r "$wanted"
    cp "$wanted" "$env/installed.txt"
  fi
  has=$("$env/bin/python" -c 'from importlib.metadata import version as v
print(*map(v, ("transformers", "peft", "trl", "accelerate")))')
  printf '\n== %s: transformers, PEFT, TRL, accelerate %s\n' "$name" "$has"
  log=$env/tests.log
  # shellcheck disable=SC2086
  "$env/bin/python" -m pytest -q -p no:cacheprovider $VERSION_TESTS "$@" > "$log" 2>&1 || {
    failed="$failed $name"
    grep -E '^(FAILED|ERROR)' "$log" || tail -n 40 "$log"
  }
  result=$(tail -n 1 "$log" | tr -d '=' | sed 's/^ *//; s/ in .*//')
  printf '%s\n' "$result"
  table="$table
$name $has $result"
done
printf '\n%s\n' "$table"
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
