#!/bin/sh
# over.sh PYTHON ENV PINS [OPTIONS...]: makes the environment ENV over PYTHON's packages, so that
# there is one torch and one build of ours, and installs the requirements PINS into it with pip's
# OPTIONS. It does nothing if it has done that for the same PINS.
set -eu
python=$1 env=$2 pins=$3
shift 3
! cmp -s "$pins" "$env/installed.txt" || exit 0
rm -rf "$env"
"$python" -m venv --without-pip "$env"
# addsitedir and not a plain path: the link to the checkout is a .pth file among the packages.
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
site=$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
printf 'import site; site.addsitedir("%s")\n' "$packages" > "$site/zz_packages.pth"
echo "== $env: installing $pins"
"$python" -m pip --python "$env/bin/python" install -q "$@" -r "$pins"
cp "$pins" "$env/installed.txt"
