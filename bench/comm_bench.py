"""Collectives of two ranks on one host beside memcpy, OpenMPI and PyTorch's gloo.

    python3 bench/comm_bench.py --torch-python VENV/bin/python

Each round runs the arms one after the other in fresh processes; an arm's figure is the best of its
calls. Writes bench/results/DATE-transport.md. See bench/README.md.
"""

import argparse
import datetime
import json
import os
import pathlib
import shlex
import subprocess
import sys

from step_bench import OURS, ROOT, machine, row

SM = "--mca coll_sm_priority 100 --mca coll_sm_fragment_size 32768"
COLLECTIVES = ("all_reduce", "reduce_scatter", "reduce_scatter_into", "all_gather")


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--torch-python", required=True, help="the interpreter of the environment that holds PyTorch")
    parser.add_argument("--mb", default="1,4,16,64,256")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--mpirun", default="mpirun --bind-to none -n 2")
    parser.add_argument("--output", help="default bench/results/DATE-transport.md")
    return parser.parse_args()


def lines_of(command):
    done = subprocess.run([str(x) for x in command], env={**os.environ, **OURS, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"failed with {done.returncode}: {shlex.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def measure(a):
    """(mb, arm) -> best seconds over all rounds."""
    mpirun, program = shlex.split(a.mpirun), ROOT / "build/bin/comm_bench"
    common = ["--mb", a.mb, "--repeats", a.repeats]
    processes = {
        "ours": mpirun + [program] + common,
        "sm": mpirun + shlex.split(SM) + [program, "--mpi-only"] + common,
        "gloo": [a.torch_python, ROOT / "bench/comm_torch.py"] + common,
    }
    best, versions = {}, {}
    for _ in range(a.rounds):
        for name, command in processes.items():
            for line in lines_of(command):
                versions |= {k: line[k] for k in ("mpi", "version") if k in line}
                for arm, seconds in line["best"].items():
                    key = line["mb"], f"{name} {arm}"
                    best[key] = min(best.get(key, 1e9), seconds)
                print(name, line["mb"], line["best"], flush=True)
    return best, versions


def report(a, best, versions):
    sizes = sorted({mb for mb, _ in best})

    def table(title, arms, of):
        yield from ("", f"## {title}", "", row("MB", *(label for label, _ in arms)), row(*["---"] * (len(arms) + 1)))
        for mb in sizes:
            yield row(mb, *(f"{of(best, mb, arm):.2f}" for _, arm in arms))

    against_copy = [(f"{c.replace('_', '-')}{place}", f"ours {c}{key}") for c in COLLECTIVES
                    for place, key in ((", pool", "_pool"), (", private", ""))]
    lines = [
        "# Collectives of two ranks on one host", "",
        f"- Date: {datetime.date.today()}", f"- Machine: {machine()}", f"- {versions['mpi']}, PyTorch {versions['version']}; f32, one thread per rank",
        "- Command: `python3 bench/comm_bench.py --torch-python VENV/bin/python"
        f" --rounds {a.rounds} --repeats {a.repeats}`",
        "- Arms interleaved, each the best call of all rounds. `pool`: arrays in memory that both ranks map; `private`: not. "
        "Collectives work in place, but for reduce-scatter-into, which leaves its input as it was."]
    lines += table("Throughput over one rank's memcpy of that size (higher is better)",
                   [("both ranks' memcpy at once", "ours memcpy_all_ranks")] + against_copy,
                   lambda best, mb, arm: best[mb, "ours memcpy"] / best[mb, arm])
    others = [("coll/sm", "sm mpi_all_reduce"), ("OpenMPI's default", "ours mpi_all_reduce"), ("gloo", "gloo all_reduce")]
    for place, key in (("pool", "_pool"), ("private", "")):
        lines += table(f"All-reduce, {place}: how many times as fast as", others,
                       lambda best, mb, arm, key=key: best[mb, arm] / best[mb, "ours all_reduce" + key])
    lines += ["", f"coll/sm: `mpirun {SM}`."]
    lines += table("Milliseconds", [("memcpy", "ours memcpy")] + against_copy + others, lambda best, mb, arm: 1e3 * best[mb, arm])
    return "\n".join(lines) + "\n"


def main():
    a = parse()
    best, versions = measure(a)
    output = pathlib.Path(a.output or ROOT / f"bench/results/{datetime.date.today()}-transport.md")
    output.write_text(report(a, best, versions))
    print(output.read_text())


if __name__ == "__main__":
    main()
