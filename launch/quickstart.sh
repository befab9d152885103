#!/usr/bin/env bash
# From a fresh clone to a model that has learned some English: installs, builds, trains a small LLaMA on
# the King James Bible with two ranks under mpirun, writes a sample and a report. Idempotent: a finished
# run is shown again, an interrupted one goes on.
set -euo pipefail
cd "$(dirname "$0")/.."

run=runs/quickstart
text=build/quickstart/bible.txt

./launch/setup.sh
TARGETS=shoal ./launch/build.sh

if [ ! -s "$text" ]; then
  mkdir -p "$(dirname "$text")"
  # The lines begin with chapter and verse; the model is to learn prose.
  bible -f 'gen1:1-rev22:21' > "$text.partial"
  mv "$text.partial" "$text"
  echo "quickstart: $(wc -c < "$text") bytes of text in $text"
fi

mpirun=(mpirun -n 2)
if [ "$(id -u)" -eq 0 ]; then mpirun+=(--allow-run-as-root); fi
if [ "$(nproc)" -lt 2 ]; then mpirun+=(--oversubscribe); fi

if [ -d "$run" ]; then
  echo "quickstart: $run is there; going on with it (remove it to start again)"
  "${mpirun[@]}" build/bin/shoal resume "$run"
else
  echo "quickstart: training with two ranks; this takes a few minutes"
  "${mpirun[@]}" build/bin/shoal train examples/quickstart.toml run.dir="$run" data.path="$text" run.log_every=20
fi

echo
echo "quickstart: what it writes after \"In the beginning\":"
echo
build/bin/shoal generate "$run" --prompt "In the beginning" --tokens 500 --temperature 0.7 --seed 1 | tee "$run/sample.txt"
echo
build/bin/shoal report "$run"
