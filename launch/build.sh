#!/usr/bin/env bash
# Configures and builds into build/; the program is build/bin/shoal. Arguments go to cmake
# (for instance -DSHOAL_CUDA=OFF); the environment's TARGETS names what to build (default: all).
set -euo pipefail
cd "$(dirname "$0")/.."

generator=()
if [ ! -f build/CMakeCache.txt ] && command -v ninja >/dev/null; then generator=(-G Ninja); fi
cmake -S . -B build "${generator[@]}" "$@" | grep -E '^-- Shoal|^  [A-Z0-9]+:|[Ww]arning|Error' || true
[ -f build/CMakeCache.txt ] || { echo "build: configuring failed; run cmake -S . -B build to see why" >&2; exit 1; }
read -r -a targets <<< "${TARGETS:-}"
cmake --build build --parallel "$(nproc)" ${targets[@]:+--target "${targets[@]}"}
