#!/bin/sh
# versions.sh PYTHON FOLDER SET... [-- ARGUMENTS...]: the tests of the integrations under each of
# these sets of releases, tests/versions/SET.txt, each in an environment of its own in FOLDER.
set -eu
python=$1 folder=$2
shift 2
: "${VERSION_TESTS:=tests/integrations tests/adapters tests/merging tests/cli}"
sets=''
while [ $# -gt 0 ] && [ "$1" != -- ]; do sets="$sets $1"; shift; done
[ $# -eq 0 ] || shift
# Without an option the longer suites stay out.
[ $# -gt 0 ] || set -- -m 'not slow' -n 2 --dist worksteal

failed=''
table='set transformers PEFT TRL accelerate result'
for name in $sets; do
  env=$folder/$name
  sh tools/over.sh "$python" "$env" "tests/versions/$name.txt"
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
