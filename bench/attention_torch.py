"""PyTorch's causal scaled_dot_product_attention, forward and backward: one JSON line per case.

FLOPs are counted for the causal half, 2 B N T^2 H forward and 2.5 times that backward (five
products where forward has two), for PyTorch and for us alike.

    python bench/attention_torch.py --threads 2
"""

import argparse
import json
import os
import statistics
import time


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sequence-lengths", default="256,1024,4096")
    parser.add_argument("--dtypes", default="f32,bf16")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0, help="measuring time per case")
    a = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(a.threads))
    import torch
    from torch.nn.functional import scaled_dot_product_attention as attention

    torch.set_num_threads(a.threads)
    for length in map(int, a.sequence_lengths.split(",")):
        for name in a.dtypes.split(","):
            dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[name]
            # [B, N, T, H] as views of [B, T, N, H], the way a Linear leaves them.
            q, k, v = (torch.randn(a.batch, length, a.heads, a.head_dim, dtype=dtype).transpose(1, 2).requires_grad_()
                       for _ in range(3))
            dout = torch.randn(a.batch, length, a.heads, a.head_dim, dtype=dtype).transpose(1, 2)
            forward, backward = [], []
            stop = time.perf_counter() + a.seconds
            while len(forward) < 5 or time.perf_counter() < stop:
                t0 = time.perf_counter()
                out = attention(q, k, v, is_causal=True)
                t1 = time.perf_counter()
                torch.autograd.grad(out, (q, k, v), dout)
                t2 = time.perf_counter()
                forward.append(t1 - t0)
                backward.append(t2 - t1)
            both = [x + y for x, y in zip(forward, backward)][2:]
            gflop = 2e-9 * a.batch * a.heads * length * length * a.head_dim
            print(json.dumps(dict(
                framework="torch", version=torch.__version__, op="attention", batch=a.batch, heads=a.heads,
                head_dim=a.head_dim, sequence_length=length, dtype=name, threads=a.threads,
                forward_gflops=gflop / min(forward), backward_gflops=2.5 * gflop / min(backward),
                gflops=3.5 * gflop / min(both), gflops_median=3.5 * gflop / statistics.median(both))), flush=True)


if __name__ == "__main__":
    main()
