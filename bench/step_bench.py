"""Training steps side by side with PyTorch, arms interleaved in fresh processes.

    python3 bench/step_bench.py --torch-python VENV/bin/python

Each round runs our arm, then every PyTorch arm; after the first round only the fastest --keep of
the PyTorch arms go on. An arm's figure is the best of its rounds' medians. Writes
bench/results/DATE-step.md. See bench/README.md.
"""

import argparse
import datetime
import json
import os
import pathlib
import shlex
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

# name -> model, batch, sequence length, precision, timed steps (half a minute a process on two cores)
WORKLOADS = {
    "llama-60m-f32": ("llama-60m", 4, 256, "fp32", 8),
    "llama-60m-bf16": ("llama-60m", 4, 256, "bf16", 12),
    "gpt2-124m-f32": ("gpt2-124m", 4, 256, "fp32", 4),
    "gpt2-124m-bf16": ("gpt2-124m", 4, 256, "bf16", 6),
    "gpt2-124m-1024-bf16": ("gpt2-124m", 4, 1024, "bf16", 2),
}

# glibc returns large blocks to the system, so PyTorch faults their pages in again at every step: up to
# a fifth of its time. It is given each of these, and its best arm counts.
MEMORY = {
    "plain": {},
    "thp": {"THP_MEM_ALLOC_ENABLE": "1"},
    "heap": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "100000000"},
}
OURS = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}  # containers
ARMS = "eager-plain,eager-heap,compile-plain,compile-thp,compile-heap"


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--torch-python", required=True, help="the interpreter of the environment that holds PyTorch")
    parser.add_argument("--ours", default=str(ROOT / "build/bin/step_bench"), help="our arm; 'none': PyTorch only")
    parser.add_argument("--ours-flags", default="", help="of build/bin/step_bench, beside the workload's: options that save memory, say")
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="of: " + " ".join(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0, help="timed steps per process; 0: as the workload says")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--arms", default=ARMS, help="PyTorch's, mode-memory; memory of: " + " ".join(MEMORY))
    parser.add_argument("--keep", type=int, default=2, help="PyTorch arms that go on after the first round")
    parser.add_argument("--bf16-weights", action="store_true",
                        help="also PyTorch with bf16 weights and optimizer state (no f32 master: listed, not compared)")
    parser.add_argument("--ranks", action="store_true",
                        help="also 2 ranks with half of the threads each against 1 rank, for the LLaMA workloads")
    parser.add_argument("--ours-ranks", default="mpirun --oversubscribe --bind-to none -n 2 {ours}",
                        help="our arm on two ranks; 'none': PyTorch only")
    parser.add_argument("--prefix", default="", help="in front of every timed command, e.g. 'taskset -c 0,1'")
    parser.add_argument("--prepare-prefix", default="", help="in front of the untimed runs that fill the compile cache")
    parser.add_argument("--clip", type=float, default=0.0, help="PyTorch arms clip by the global norm (0: they do not)")
    parser.add_argument("--output", help="default bench/results/DATE-step.md")
    return parser.parse_args()


def call(command, prefix, extra):
    """The last JSON line that a command prints."""
    full = shlex.split(prefix) + [str(x) for x in command]
    done = subprocess.run(full, env={**os.environ, **extra}, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        sys.exit(f"failed with {done.returncode}: {shlex.join(full)}\n{done.stdout}{done.stderr}")
    return json.loads(lines[-1])


class Bench:
    def __init__(self, a):
        self.a = a
        self.raw = []
        self.arms = [tuple(x.split("-")) for x in a.arms.split(",")]
        for arm in self.arms:
            if len(arm) != 2 or arm[0] not in ("eager", "compile") or arm[1] not in MEMORY:
                sys.exit(f"--arms: {'-'.join(arm)} is none of eager or compile, -, and {' or '.join(MEMORY)}")

    def ours(self, workload, ranks=1):
        model, batch, length, precision, steps = WORKLOADS[workload]
        program = [self.a.ours] if ranks == 1 else shlex.split(self.a.ours_ranks.format(ours=self.a.ours))
        command = program + ["--model", model, "--batch", batch, "--sequence-length", length, "--precision", precision,
                             "--threads", self.a.threads, "--steps", self.a.steps or steps]  # threads over all ranks
        command += shlex.split(self.a.ours_flags)
        return self.record(workload, "ours", ranks, call(command, self.a.prefix, OURS))

    def torch(self, workload, mode, memory, dtype, ranks=1, prepare=False):
        model, batch, length, _, steps = WORKLOADS[workload]
        steps = ["--steps", 1, "--no-gemm"] if prepare else ["--steps", self.a.steps or steps]
        command = [self.a.torch_python, ROOT / "bench/torch_step.py", "--model", model, "--batch", batch,
                   "--sequence-length", length, "--dtype", dtype, "--mode", mode, "--warmup", 1 if length > 256 else 2,
                   "--threads", self.a.threads // ranks, "--ranks", ranks, "--clip", self.a.clip] + steps
        # The compiler's cache outlives the process: later ones start warm.
        extra = {"OMP_NUM_THREADS": str(self.a.threads // ranks), **MEMORY[memory]}
        if prepare:
            return call(command, self.a.prepare_prefix, extra)
        return self.record(workload, f"torch {dtype} {mode} {memory}", ranks, call(command, self.a.prefix, extra))

    def record(self, workload, arm, ranks, line):
        self.raw.append(dict(line, workload=workload, arm=arm, ranks=ranks))
        print(f"{workload} ranks {ranks} {arm}: {line['tokens_per_second']:.0f} tokens/s, "
              f"{line['peak_rss_mb']:.0f} MB", flush=True)
        return line

    def compete(self, workload, ranks, arms):
        """Interleaved rounds of our arm and `arms`, (mode, memory, dtype)."""
        ours = self.a.ours if ranks == 1 else self.a.ours_ranks
        for dtype in sorted({d for _, _, d in arms}):
            if any(m == "compile" and d == dtype for m, _, d in arms):
                self.torch(workload, "compile", "plain", dtype, ranks, prepare=True)
        speed = {arm: 0.0 for arm in arms}
        for i in range(self.a.rounds):
            if "none" not in (ours, self.a.ours):
                self.ours(workload, ranks)
            for arm in arms:
                mode, memory, dtype = arm
                line = self.torch(workload, mode, memory, dtype, ranks)
                speed[arm] = max(speed[arm], line["tokens_per_second"])
            arms = sorted(arms, key=lambda x: -speed[x])[: self.a.keep]

    def run(self):
        for workload in self.a.workloads.split(","):
            if workload not in WORKLOADS:
                sys.exit(f"--workloads: {workload} is none of {' '.join(WORKLOADS)}")
            f32 = WORKLOADS[workload][3] == "fp32"
            arms = [(mode, memory, "f32" if f32 else "bf16") for mode, memory in self.arms]
            self.compete(workload, 1, arms)
            if self.a.bf16_weights and not f32:
                self.torch(workload, "compile", "plain", "bf16-weights", prepare=True)
                for memory in ("plain", "heap"):
                    self.torch(workload, "compile", memory, "bf16-weights")
            if self.a.ranks and workload.startswith("llama"):
                self.compete(workload, 2, [(mode, memory, "f32" if f32 else "bf16")
                                           for mode in ("eager", "compile") for memory in ("plain", "heap")])


def arms_of(raw, workload, ranks):
    """arm -> its best round, the slowest median, and the lowest peak of its rounds."""
    out = {}
    for line in raw:
        if line["workload"] == workload and line["ranks"] == ranks:
            best = out.setdefault(line["arm"], dict(line, slowest=line["tokens_per_second"], rounds=0))
            best["rounds"] += 1
            if "others_cpu_percent" in line:
                best["others_cpu_percent"] = max(best["others_cpu_percent"], line["others_cpu_percent"])
            best["slowest"] = min(best["slowest"], line["tokens_per_second"])
            for key in ("tokens_per_second", "tokens_per_second_best", "gemm_gflops"):
                best[key] = max(best.get(key) or 0, line.get(key) or 0)
            best["peak_rss_mb"] = max(best["peak_rss_mb"], line["peak_rss_mb"])
    return out


def same_math(arms):
    return {k: v for k, v in arms.items() if k.startswith("torch") and "bf16-weights" not in k}


def fastest(arms):
    return max(same_math(arms).items(), key=lambda x: x[1]["tokens_per_second"])


def row(*cells):
    return "| " + " | ".join(str(c) for c in cells) + " |"


def machine():
    """The class of machine: no name that tells one machine from another of its kind."""
    with open("/proc/cpuinfo") as f:
        cpu = dict(tuple(x.strip() for x in line.split(":", 1)) for line in f if ":" in line)
    model = f"{cpu.get('model name', 'processor')} (family {cpu.get('cpu family', '?')} model {cpu.get('model', '?')})"
    features = [x for x in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if x in cpu.get("flags", "").split()]
    with open("/proc/meminfo") as f:
        memory = int(f.readline().split()[1]) >> 20
    return f"{model}, {os.cpu_count()} CPUs, {memory} GB, {' '.join(features)}"


def report(a, raw):
    version = next((x["version"] for x in raw if "version" in x), "?")
    lines = [
        "# Training steps: Shoal and PyTorch on the same CPU", "",
        f"- Date: {datetime.date.today()}", f"- Machine: {machine()}", f"- PyTorch {version}, {a.threads} threads",
        "- Command: `" + shlex.join(["python3", "bench/step_bench.py"] + public_arguments(a)) + "`",
        f"- Arms interleaved in fresh processes, {a.rounds} rounds; an arm's figure is the best of its "
        "rounds' medians, its peak the largest resident size. GEMM: best GF/s, measured by each side in the same processes.", "",
        "## Ratios", "",
        row("workload", "ours tokens/s", "best PyTorch tokens/s", "its arm", "ratio", "ours MB", "PyTorch MB", "memory ratio",
            "leanest PyTorch MB", "GEMM GF/s ours / PyTorch"),
        row(*["---"] * 10)]
    workloads = list(dict.fromkeys(x["workload"] for x in raw))
    for workload in workloads:
        arms = arms_of(raw, workload, 1)
        name, torch = fastest(arms)
        ours = arms.get("ours")
        leanest = min(x["peak_rss_mb"] for x in same_math(arms).values())
        if ours:
            lines.append(row(
                workload, f"{ours['tokens_per_second']:.0f}", f"{torch['tokens_per_second']:.0f}", name[6:],
                f"**{ours['tokens_per_second'] / torch['tokens_per_second']:.2f}**", f"{ours['peak_rss_mb']:.0f}",
                f"{torch['peak_rss_mb']:.0f}", f"**{ours['peak_rss_mb'] / torch['peak_rss_mb']:.2f}**", f"{leanest:.0f}",
                f"{ours['gemm_gflops']:.0f} / {torch['gemm_gflops']:.0f}"))
        else:
            lines.append(row(workload, "-", f"{torch['tokens_per_second']:.0f}", name[6:], "-", "-",
                             f"{torch['peak_rss_mb']:.0f}", "-", f"{leanest:.0f}", f"- / {torch['gemm_gflops']:.0f}"))
    if any(x["ranks"] > 1 for x in raw):
        lines += ["", "## Two ranks with half of the threads each, over one rank", "",
                  row("workload", "arm", "1 rank tokens/s", "2 ranks tokens/s", "ratio"), row(*["---"] * 5)]
        for workload in workloads:
            one, two = arms_of(raw, workload, 1), arms_of(raw, workload, 2)
            if not two:
                continue
            pairs = [("best PyTorch, DDP over gloo", fastest(one)[1], fastest(two)[1])]
            if "ours" in one and "ours" in two:
                pairs.insert(0, ("ours", one["ours"], two["ours"]))
            for name, x, y in pairs:
                lines.append(row(workload, name, f"{x['tokens_per_second']:.0f}", f"{y['tokens_per_second']:.0f}",
                                 f"{y['tokens_per_second'] / x['tokens_per_second']:.2f}"))
    parts = {w: arms_of(raw, w, 1).get("ours", {}).get("percent") for w in workloads}
    if any(parts.values()):
        names = list(dict.fromkeys(k for p in parts.values() if p for k in p))
        lines += ["", "## Where our step goes, percent", "", row("workload", *names), row(*["---"] * (len(names) + 1))]
        lines += [row(w, *(f"{p[k]:.1f}" if k in p else "-" for k in names)) for w, p in parts.items() if p]
    lines += ["", "## All arms", "",
              row("workload", "ranks", "arm", "rounds", "tokens/s", "slowest round", "best step", "peak MB", "GEMM GF/s",
                  "others' CPU, percent"),
              row(*["---"] * 10)]
    for workload in workloads:
        for ranks in (1, 2):
            for name, x in arms_of(raw, workload, ranks).items():
                lines.append(row(workload, ranks, name, x["rounds"], f"{x['tokens_per_second']:.0f}", f"{x['slowest']:.0f}",
                                 f"{x['tokens_per_second_best']:.0f}", f"{x['peak_rss_mb']:.0f}", f"{x['gemm_gflops']:.0f}",
                                 f"{x['others_cpu_percent']:.0f}" if "others_cpu_percent" in x else "-"))
    lines += ["", "`plain`, `thp`, `heap`: how PyTorch gets large blocks (bench/README.md). `bf16` is autocast with f32 weights; "
              "`bf16-weights` has no f32 master and is not compared. "
              "Others' CPU: the most that other processes and the machine's host took while an arm was timed."]
    return "\n".join(lines) + "\n"


def public_arguments(a):
    """The command line without the paths of this machine."""
    out = ["--torch-python", "VENV/bin/python", "--rounds", str(a.rounds), "--threads", str(a.threads),
           "--workloads", a.workloads]
    if a.ours == "none":
        out += ["--ours", "none"]
    if a.ours_flags:
        out += ["--ours-flags", a.ours_flags]
    if a.arms != ARMS:
        out += ["--arms", a.arms]
    return out + [f"--{x.replace('_', '-')}" for x in ("bf16_weights", "ranks") if getattr(a, x)] + (
        ["--clip", str(a.clip)] if a.clip else []) + (["--steps", str(a.steps)] if a.steps else [])


def main():
    a = parse()
    if a.ours != "none" and not pathlib.Path(a.ours).exists():
        sys.exit(f"--ours: there is no {a.ours}; build the target step_bench, or pass --ours none")
    bench = Bench(a)
    bench.run()
    output = pathlib.Path(a.output or ROOT / f"bench/results/{datetime.date.today()}-step.md")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(report(a, bench.raw))
    print(output.read_text())


if __name__ == "__main__":
    main()
