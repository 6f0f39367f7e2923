#!/bin/sh
# installed.sh PYTHON ARGUMENTS...: runs PYTHON in an empty folder, with the qlora_ext that is
# installed there. In the checkout it would import the source.
set -eu
case $1 in
  /*) python=$1 ;;
  *) python=$PWD/$1 ;;
esac
shift
empty=$(mktemp -d)
trap 'rm -rf "$empty"' EXIT
cd "$empty"
"$python" - << 'END'
import pathlib, sysconfig, qlora_ext
found, want = pathlib.Path(qlora_ext.__file__).resolve(), pathlib.Path(sysconfig.get_path("platlib"))
assert want.resolve() in found.parents, f"qlora_ext is {found}, want the one installed in {want}"
END
"$python" "$@"
