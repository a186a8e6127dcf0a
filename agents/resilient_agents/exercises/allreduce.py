"""All-reduce: a process group of processes of this node, on gloo or nccl: whether the sums are right, and how fast they come.

Contract: the caller's process becomes the parent of one process for each rank; they meet through a file. Every rank gives integers, so the
sum is known to the last bit; every element is compared on every rank. Bandwidth as nccl-tests tell it: bytes * 2(n-1)/n / seconds.
"""

from __future__ import annotations

import datetime as dt
import os
import select
import socket
import tempfile
import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from resilient.core.messages import NONE
from resilient_agents.isolation import Isolated


def run(backend: str, devices: list[int], world: int, num_bytes: int, repeats: int, limit_s: float) -> dict[str, Any]:
    """devices: one for each rank, [] = the processor. Gives gb_s of the slowest rank, and wrong: "" = right everywhere."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    until = time.monotonic() + limit_s
    with tempfile.TemporaryDirectory(prefix="resilient.") as directory:
        store = os.path.join(directory, "store")
        chairs = [
            _Chair(backend, store, rank, world, devices[rank] if devices else NONE, num_bytes, repeats, limit_s) for rank in range(world)
        ]
        ranks = [Isolated(chair.sit) for chair in chairs]
        answers = [_heard(rank, until) for rank in ranks]
        hows = [rank.end(kill=not answer) for rank, answer in zip(ranks, answers, strict=True)]
    silent = [f"rank {rank}: {how or 'no answer'}" for rank, (answer, how) in enumerate(zip(answers, hows, strict=True)) if not answer]
    if silent:
        return {"gb_s": 0.0, "wrong": "; ".join(silent)[:300]}
    told = [answer.decode().split(" ", 1) for answer in answers]
    wrong = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(told) if text]
    return {"gb_s": min(float(speed) for speed, _ in told), "wrong": "; ".join(wrong)[:300]}


def _heard(rank: Isolated, until: float) -> bytes:
    ready, _, _ = select.select([rank], [], [], max(0.0, until - time.monotonic()))
    return rank.hear() if ready else b""


class _Chair(NamedTuple):
    backend: str
    store: str
    rank: int
    world: int
    number: int  # of its CUDA device
    num_bytes: int
    repeats: int
    limit_s: float

    def sit(self, line: socket.socket) -> None:
        """What one rank does; says its speed and what was wrong."""
        device = torch.device("cpu") if self.number == NONE else torch.device("cuda", self.number)
        if self.number != NONE:
            torch.cuda.set_device(device)
        torch.set_num_threads(1)
        store, timeout = dist.FileStore(self.store, self.world), dt.timedelta(seconds=self.limit_s)
        dist.init_process_group(self.backend, store=store, rank=self.rank, world_size=self.world, timeout=timeout)
        places = torch.arange(self.num_bytes // 4, dtype=torch.int32, device=device) % 1000
        expected = (places * self.world + sum(range(self.world))).float()  # below 2**24, so exact in float32 whatever the order
        best, wrong = float("inf"), 0
        for _ in range(self.repeats + 1):  # the first one builds connections
            values = (places + self.rank).float()
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(values)
            if self.number != NONE:
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - began)
            wrong += int((values != expected).sum())
        dist.destroy_process_group()
        speed = self.num_bytes * 2 * (self.world - 1) / self.world / best / 1e9
        line.send(f"{speed} {f'{wrong} elements of the sum differ' if wrong else ''}".encode())
