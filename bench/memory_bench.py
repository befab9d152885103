"""What each option that saves memory saves and costs: peak bytes and step time, on and off.

    python3 bench/memory_bench.py

Arms in turn, round by round, in fresh processes. Writes bench/results/DATE-memory.md. See bench/README.md.
"""

import argparse
import datetime
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import tempfile

from step_bench import OURS, ROOT, machine, row

CLASSES = ("parameters", "gradients", "optimizer", "activations", "communication", "workspace")
# name, flags, and the arm before it that it is compared with; {dir} is a folder for files.
ONE_RANK = [
    ("as it is", "", None),
    ("recompute, selective", "--recompute selective", "as it is"),
    ("recompute, full", "--recompute full", "as it is"),
    ("MLPs over chunks", "--mlp-chunk-rows 256", "as it is"),
    ("recompute full, MLPs over chunks", "--recompute full --mlp-chunk-rows 256", "as it is"),
    ("activations in 8-bit blocks", "--compress int8", "as it is"),
    ("activations in a file", "--activations-dir {dir}", "as it is"),
    ("updates in backward", "--in-backward", "as it is"),
    ("masters in halves", "--split-master", "as it is"),
    ("states in a file", "--offload-dir {dir}", "as it is"),
    ("recompute full, updates in backward", "--recompute full --in-backward", "as it is"),
    ("and masters in halves", "--recompute full --in-backward --split-master", "as it is"),
]
TWO_RANKS = [
    ("tp 2, recompute full", "--local-ranks 2 --tp 2 --recompute full", None),
    ("and Pa", "--local-ranks 2 --tp 2 --recompute full --partition-activations", "tp 2, recompute full"),
    ("and Pa in a file", "--local-ranks 2 --tp 2 --recompute full --partition-activations --activations-dir {dir}", "tp 2, recompute full"),
    ("zero 2, buckets of any size", "--local-ranks 2 --zero-stage 2 --bucket-bytes 1000000000", None),
    ("CB: buckets of 1 MiB", "--local-ranks 2 --zero-stage 2 --bucket-bytes 1048576", "zero 2, buckets of any size"),
]


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="llama-60m")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", help="default bench/results/DATE-memory.md")
    return parser.parse_args()


def run(a, flags, folder):
    command = [ROOT / "build/bin/step_bench", "--model", a.model, "--batch", a.batch, "--sequence-length", a.sequence_length, "--precision",
               a.precision, "--steps", a.steps, "--warmup", 1] + shlex.split(flags.format(dir=folder))
    done = subprocess.run([str(x) for x in command], env={**os.environ, **OURS}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"failed with {done.returncode}: {shlex.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout)


def main():
    a = parse()
    arms = ONE_RANK + TWO_RANKS
    figures = {name: [] for name, _, _ in arms}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(a.rounds):
            for name, flags, _ in arms:
                figures[name].append(run(a, flags, folder))
                print(name, json.dumps(figures[name][-1]["peak_mb"]), figures[name][-1]["tokens_per_second"], flush=True)
    speed = {name: statistics.median(f["tokens_per_second"] for f in runs) for name, runs in figures.items()}
    lines = [
        f"# Options that save memory, on and off: {a.model}", "", f"- Date: {datetime.date.today()}", f"- Machine: {machine()}",
        f"- Command: `python3 bench/memory_bench.py --model {a.model} --batch {a.batch} --sequence-length {a.sequence_length}"
        f" --precision {a.precision} --steps {a.steps} --rounds {a.rounds}`",
        f"- {a.batch} x {a.sequence_length} tokens a step, {a.precision}; ranks are threads, one core each where there are two. Peaks of rank 0's "
        "allocator in MB, by class and of the sum; they are the same in every round. Step time: medians over the rounds, over the arm above "
        "that is compared with.", "",
        row("arm", "flags", *CLASSES, "peak", "step time"), row(*["---"] * (len(CLASSES) + 4))]
    for name, flags, base in arms:
        first = figures[name][0]
        lines.append(row(name, f"`{flags}`" if flags else "", *(f"{first['peak_mb'][c]:.1f}" for c in CLASSES), f"{first['allocator_peak_mb']:.1f}",
                         "1" if base is None else f"{speed[base] / speed[name]:.2f}"))
    output = pathlib.Path(a.output or ROOT / f"bench/results/{datetime.date.today()}-memory.md")
    output.write_text("\n".join(lines) + "\n")
    print(output.read_text())


if __name__ == "__main__":
    main()
