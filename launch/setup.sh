#!/usr/bin/env bash
# Installs what Shoal is built from: packages of Debian 12, by name. Idempotent; says what it installs.
set -euo pipefail

packages=(
  build-essential cmake ninja-build ccache pkg-config git python3
  libdnnl-dev libhwy-dev                      # CPU kernels
  libopenmpi-dev openmpi-bin                  # ranks as processes
  libhdf5-dev libxxhash-dev libsentencepiece-dev
  libcli11-dev libtomlplusplus-dev nlohmann-json3-dev libspdlog-dev libfmt-dev
  libgtest-dev libgmock-dev libbenchmark-dev
  clang-format clang-tidy                     # tests/lint
  bible-kjv                                   # the quickstart's text
)

missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ]; then
  echo "setup: all packages are installed"
  exit 0
fi

sudo=()
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || { echo "setup: needs root to install: ${missing[*]}" >&2; exit 1; }
  sudo=(sudo)
fi
echo "setup: installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
"${sudo[@]}" apt-get update -qq
"${sudo[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
echo "setup: done"
