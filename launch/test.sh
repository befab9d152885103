#!/usr/bin/env bash
# Installs, builds, and runs all tests but those labelled `long`. Arguments go to ctest
# (for instance -L long, or -R parity).
set -euo pipefail
cd "$(dirname "$0")/.."

./launch/setup.sh
./launch/build.sh
echo "test: running"
select=(-LE 'long|sanitizer')
for argument in "$@"; do
  case "$argument" in -L | -LE | -R) select=() ;; esac
done
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
exec ctest --test-dir build --output-on-failure --parallel "$(nproc)" "${select[@]}" "$@"
