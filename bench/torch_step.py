"""One PyTorch arm of the step benchmark in one process: trains, prints one JSON line.

    python bench/torch_step.py --model llama-60m --batch 4 --sequence-length 256 --dtype bf16 --mode compile
"""

import argparse
import contextlib
import json
import os
import statistics
import time


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=["llama-60m", "gpt2-124m"], required=True)
    parser.add_argument("--batch", type=int, default=4, help="sequences per step over all ranks")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--dtype", choices=["f32", "bf16", "bf16-weights"], default="f32",
                        help="bf16 is autocast with f32 weights; bf16-weights also holds weights and optimizer\n"
                        "state in bf16, without an f32 master")
    parser.add_argument("--mode", choices=["eager", "compile"], default="eager")
    parser.add_argument("--threads", type=int, default=2, help="per rank")
    parser.add_argument("--ranks", type=int, default=1, help="DistributedDataParallel over gloo")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--clip", type=float, default=0.0, help="clip by the global gradient norm; 0: do not")
    parser.add_argument("--no-gemm", action="store_true", help="do not measure the GEMM peak afterwards")
    return parser.parse_args()


def resident_mb(key="VmHWM"):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(key + ":")) / 1024


def minor_faults():
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def cpu_seconds():
    """Seconds of CPU time that anybody used on this machine, time stolen by its host included, and ours."""
    with open("/proc/stat") as f:
        user, nice, system, _, _, irq, softirq, steal = map(int, f.readline().split()[1:9])
    mine = os.times()
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK"), mine.user + mine.system


def gemm_gflops(dtype):
    """The best of a few shapes and repeats, y = x w^T."""
    import torch

    best = 0.0
    for m, k, n in ((1024, 512, 1536), (1024, 768, 3072), (1024, 1024, 4096), (1536, 1536, 1536)):
        x, w = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
        y = torch.empty(m, n, dtype=dtype)
        for _ in range(9):
            start = time.perf_counter()
            torch.mm(x, w.t(), out=y)
            best = max(best, 2e-9 * m * k * n / (time.perf_counter() - start))
    return best


def train(rank, a, store):
    import torch
    from torch_models import MODELS, Model

    torch.set_num_threads(a.threads)
    torch.manual_seed(1)
    imported = resident_mb("VmRSS")
    weights = torch.bfloat16 if a.dtype == "bf16-weights" else torch.float32
    model = Model(a.model, a.sequence_length, torch.float32 if a.dtype == "f32" else torch.bfloat16).to(weights)
    parameters = sum(p.numel() for p in model.parameters())
    step_model = model
    if a.ranks > 1:
        torch.distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=a.ranks)
        step_model = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)
    if a.mode == "compile":
        step_model = torch.compile(step_model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    batch = a.batch // a.ranks
    generator = torch.Generator().manual_seed(2 + rank)
    seconds = []
    first = time.perf_counter()
    for step in range(a.warmup + a.steps):
        if step == a.warmup:
            began, all_before, mine_before = time.perf_counter(), *cpu_seconds()
        ids = torch.randint(MODELS[a.model]["vocab"], (batch, a.sequence_length + 1), generator=generator)
        if a.ranks > 1:
            torch.distributed.barrier()
        faults, start = minor_faults(), time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16) if a.dtype == "bf16" else contextlib.nullcontext():
            loss = step_model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        if a.clip > 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), a.clip)
        optimizer.step()
        if a.ranks > 1:
            torch.distributed.barrier()
        end = time.perf_counter()
        if step == 0:
            first = end - first
        if step >= a.warmup:
            seconds.append(end - start)
    faults = minor_faults() - faults
    all_after, mine_after = cpu_seconds()
    others = (all_after - all_before) - a.ranks * (mine_after - mine_before)  # ranks are alike
    peak = resident_mb()
    tokens = a.batch * a.sequence_length
    result = dict(
        framework="torch", version=torch.__version__, model=a.model, batch=a.batch,
        sequence_length=a.sequence_length, dtype=a.dtype, mode=a.mode, threads=a.threads, ranks=a.ranks,
        parameters=parameters, tokens_per_second=tokens / statistics.median(seconds),
        tokens_per_second_best=tokens / min(seconds), peak_rss_mb=peak, imported_rss_mb=imported,
        first_step_seconds=first, minor_faults_per_step=faults,
        others_cpu_percent=max(0.0, 100 * others / (time.perf_counter() - began) / os.cpu_count()), loss=loss.item())
    if not a.no_gemm:
        result["gemm_gflops"] = gemm_gflops(torch.float32 if a.dtype == "f32" else torch.bfloat16)
    if rank == 0:
        print(json.dumps(result), flush=True)
    if a.ranks > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def main():
    a = arguments()
    if a.batch % a.ranks:
        raise SystemExit(f"--batch {a.batch} is not divisible by --ranks {a.ranks}")
    os.environ.setdefault("OMP_NUM_THREADS", str(a.threads))  # before torch is loaded
    if a.ranks == 1:
        train(0, a, None)
        return
    import multiprocessing
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        ranks = [context.Process(target=train, args=(r, a, folder + "/store")) for r in range(a.ranks)]
        for p in ranks:
            p.start()
        for p in ranks:
            p.join()
        if any(p.exitcode for p in ranks):
            raise SystemExit("a rank failed")


if __name__ == "__main__":
    main()
