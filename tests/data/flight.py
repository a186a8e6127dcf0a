"""Makes the flight-recorder dumps of tests/data/incidents: `python tests/data/flight.py stuck|mismatch DIRECTORY`.

Think of a play with one actor who misses an entrance. Four ranks over gloo reduce, broadcast in pairs and meet at a barrier; then, "stuck":
rank 2 does not enter the fifth collective; "mismatch": rank 3 calls another one than the rest. Each writes what torch recorded of it, as
torch's own pickle (`fr_rank<N>`, what `torchfrtrace` reads) and as JSON.
"""

from __future__ import annotations

import datetime as dt
import os
import pathlib
import sys
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch._C._distributed_c10d import _dump_fr_trace, _dump_fr_trace_json


def job(rank: int, kind: str, out: str, store: str) -> None:
    dist.init_process_group("gloo", f"file://{store}", dt.timedelta(seconds=30), 4, rank)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    for _ in range(3):
        some = torch.ones(1024) * rank
        dist.all_reduce(some)
        dist.broadcast(some, src=rank // 2 * 2, group=pairs[rank // 2])
    dist.barrier()
    if kind == "mismatch" and rank == 3:
        dist.broadcast(torch.ones(2048), src=3, async_op=True)
    elif not (kind == "stuck" and rank == 2):
        dist.all_reduce(torch.ones(2048), async_op=True)
    time.sleep(2)  # all have entered what they will enter
    pathlib.Path(out, f"fr_rank{rank}").write_bytes(_dump_fr_trace())
    pathlib.Path(out, f"fr_rank{rank}.json").write_bytes(_dump_fr_trace_json())
    time.sleep(2)  # nobody leaves before all have written
    os._exit(0)  # what is under way never ends


if __name__ == "__main__":
    os.environ["TORCH_FR_BUFFER_SIZE"] = "200"
    which, where = sys.argv[1], os.path.abspath(sys.argv[2])
    os.makedirs(where, exist_ok=True)
    mp.spawn(job, args=(which, where, os.path.join(where, "store")), nprocs=4)
    os.remove(os.path.join(where, "store"))
