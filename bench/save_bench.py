"""What a save costs a run: how long training waits, how steps slow down, and how fast the disk is fed.

    python3 bench/save_bench.py

Trains with a save now and then, in turn with staging memory for all of the state, with little of it, and with saves that
are not asynchronous; before each it writes as many bytes with dd. Writes bench/results/DATE-saves.md. See bench/README.md.
"""

import argparse
import datetime
import json
import pathlib
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from step_bench import ROOT, machine, row

CONFIG = """
[run]
dir = "{dir}"
steps = {steps}
log_every = 1000
[model]
preset = "{model}"
[data]
path = "{text}"
sequence_length = {length}
validation_fraction = 0
[batch]
sequences = {batch}
[optim]
name = "adamw"
lr = 1e-5
[precision]
compute = "bf16"
[checkpoint]
every = {every}
keep = 1
async = {asynchronous}
staging = "{staging}"
"""


ARMS = {"all of the state": ("8GiB", True), "64 MiB": ("64MiB", True), "not asynchronous": ("64MiB", False)}


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="gpt2-124m")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--every", type=int, default=8)
    parser.add_argument("--saves", type=int, default=2, help="in a run, beside the last one, which training always waits for")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--directory", help="on the disk to be measured; default: of temporary files")
    parser.add_argument("--program", action="append", help="a build to measure; several are measured in turn; default build/bin/shoal")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--output", help="default bench/results/DATE-saves.md")
    return parser.parse_args()


def copy_seconds(size):
    """Of one thread, the best of three."""
    source, best = bytearray(size), 1e9
    target = bytearray(size)
    for _ in range(3):
        begin = time.perf_counter()
        memoryview(target)[:] = source
        best = min(best, time.perf_counter() - begin)
    return best


def dd_seconds(folder, size):
    file = folder / "dd"
    begin = time.perf_counter()
    subprocess.run(["dd", "if=/dev/zero", f"of={file}", "bs=8M", f"count={size >> 23}", "conv=fsync"], check=True, capture_output=True)
    seconds = time.perf_counter() - begin
    file.unlink()
    return seconds * size / (size >> 23 << 23)


def train(a, folder, program, staging, asynchronous):
    """Steps' seconds, and of each save: step, seconds until durable, seconds that training waited."""
    run, text = folder / "run", folder / "text"
    shutil.rmtree(run, ignore_errors=True)
    text.write_bytes(bytes(97 + (i * 7919 >> 3) % 26 for i in range(1 << 20)))
    config = folder / "config.toml"
    config.write_text(CONFIG.format(dir=run, text=text, steps=a.every * (a.saves + 1), model=a.model, length=a.length, batch=a.batch,
                                    every=a.every, staging=staging, asynchronous=str(asynchronous).lower()))
    done = subprocess.run([program, "train", config], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"train ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    steps = [json.loads(line)["seconds"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    log = (run / "log/rank-0.log").read_text()
    saves = [(int(s), float(d), float(w)) for s, d, w in
             re.findall(r"save of step (\d+) durable after ([\d.]+) s; training waited ([\d.]+) s", log)]
    size = sum(f.stat().st_size for f in max((run / "checkpoints").iterdir()).iterdir())
    shutil.rmtree(run)
    return steps, saves, size


def behind(steps, saves):
    """Seconds of steps while a save was on its way, without what they waited for copies; and of the others."""
    during, apart, busy = [], [], set()
    for step, durable, waited in saves[:-1]:
        left = durable
        for i in range(step, len(steps)):
            if left <= 0:
                break
            busy.add(i)
            # A step counts that lies in the save whole.
            if steps[i] <= left:
                during.append(steps[i] - (waited if i == step else 0))
            left -= steps[i]
    apart = [s for i, s in enumerate(steps) if i not in busy and i > 0]
    return during, apart


def public_arguments(arguments):
    """The command line without the paths of this machine."""
    private = {"--output", "--directory"}
    return [x for before, x in zip(["", *arguments], arguments) if x.split("=")[0] not in private and before not in private]


def main():
    a = parse()
    folder = pathlib.Path(tempfile.mkdtemp(dir=a.directory))
    programs = a.program or [ROOT / "build/bin/shoal"]
    arms = {f"{arm}, {pathlib.Path(program).name}" if len(programs) > 1 else arm: (program, *ARMS[arm]) for arm in a.arms for program in programs}
    figures = {arm: {"steps": [], "during": [], "first": [], "later": [], "durable": []} for arm in arms}
    dd, size = [], 0
    try:
        for _ in range(a.rounds):
            for arm, (program, staging, asynchronous) in arms.items():
                steps, saves, size = train(a, folder, program, staging, asynchronous)
                dd.append(dd_seconds(folder, size))
                f = figures[arm]
                during, apart = behind(steps, saves)
                f["steps"] += apart
                f["during"] += during if asynchronous else []
                f["first"].append(saves[0][2])
                f["later"] += [w for _, _, w in saves[1:-1]]
                f["durable"] += [d for _, d, _ in saves[:-1]]
                print(arm, f, f"dd {dd[-1]:.2f}", flush=True)
    finally:
        shutil.rmtree(folder)
    best_dd, copy = min(dd), copy_seconds(size)
    lines = [
        f"# What a save of {a.model} costs", "", f"- Date: {datetime.date.today()}", f"- Machine: {machine()}",
        f"- Command: `{shlex.join(['python3', 'bench/save_bench.py', *public_arguments(sys.argv[1:])])}`",
        f"- A save has {size / 1e9:.2f} GB; bf16, {a.batch} x {a.length} tokens a step, one rank. To copy it takes one thread {copy:.2f} s; "
        f"`dd conv=fsync` writes as much in {best_dd:.2f} s at best, {statistics.median(dd):.2f} s in the median of {len(dd)}.",
        "- Medians; a run's last save is not counted, which training always waits for.", "",
        row("staging", "training waited for the first save, s", "for a later one, s", "the first's over the copy", "durable after, s",
            "dd's best over it", "a step, s", "a step while it is written, s", "ratio"),
        row(*["---"] * 9)]
    for arm, f in figures.items():
        first, durable, step = (statistics.median(f[k]) for k in ("first", "durable", "steps"))
        during, later = (statistics.median(f[k]) if f[k] else None for k in ("during", "later"))
        lines.append(row(arm, f"{first:.2f}", "-" if later is None else f"{later:.2f}", f"{first / copy:.2f}", f"{durable:.2f}",
                         f"{best_dd / durable:.2f}", f"{step:.2f}", *(("-", "-") if during is None else (f"{during:.2f}", f"{during / step:.2f}"))))
    output = pathlib.Path(a.output or ROOT / f"bench/results/{datetime.date.today()}-saves.md")
    output.write_text("\n".join(lines) + "\n")
    print(output.read_text())


if __name__ == "__main__":
    main()
