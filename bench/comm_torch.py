"""PyTorch's all_reduce over gloo between processes of this host: one JSON line per size.

    python bench/comm_torch.py --mb 1,4,16,64,256
"""

import argparse
import json
import statistics
import tempfile
import time


def run(rank, a, store):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=a.ranks)
    for mb in map(int, a.mb.split(",")):
        data, other = torch.zeros(mb << 18), torch.zeros(mb << 18)

        def memcpy():
            if rank == 0:
                other.copy_(data)

        arms = {"memcpy": memcpy, "all_reduce": lambda: dist.all_reduce(data)}
        seconds = {name: [] for name in arms}
        for i in range(a.repeats * max(1, min(16, 64 // mb)) + 1):
            for name, call in arms.items():
                dist.barrier()
                begin = time.perf_counter()
                call()
                mine = torch.tensor([time.perf_counter() - begin])
                dist.all_reduce(mine, op=dist.ReduceOp.MAX)
                if i > 0:
                    seconds[name].append(mine.item())
        if rank == 0:
            print(json.dumps({"mb": mb, "ranks": a.ranks, "version": torch.__version__,
                              "best": {k: min(v) for k, v in seconds.items()},
                              "median": {k: statistics.median(v) for k, v in seconds.items()}}), flush=True)
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--mb", default="1,4,16,64,256")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=10)
    a = parser.parse_args()
    import torch.multiprocessing as mp

    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, args=(a, folder + "/store"), nprocs=a.ranks)


if __name__ == "__main__":
    main()
