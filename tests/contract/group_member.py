"""One member of the group contract (started by test_group.py): `group_member.py RANK WORLD PORT`; prints one line per check."""

from __future__ import annotations

import sys
import threading
import time

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from resilient.core.messages import Plan, Seated
from resilient.errors import RoundAborted
from resilient.train.backend import install
from resilient.train.comm import Comm
from resilient.train.recorder import Recorder
from resilient.train.scope import Scope

rank, world, port = (int(word) for word in sys.argv[1:])
suspicions: list[tuple[int, str]] = []
scope = Scope()
recorder = Recorder(rank, lambda _message: None, "off")
comm = Comm(rank=rank, world_size=world, kind="gloo", scope=scope, recorder=recorder, on_suspect=lambda r, t: suspicions.append((r, t)))
install(comm, dist.HashStore())


def seat(round_: int) -> Seated:
    return Seated(
        round=round_, rank=rank, local_rank=rank, world_size=world, node_rank=0, nodes=1, local_world_size=world,
        store=f"127.0.0.1:{port}", plan=Plan(),
    )  # fmt: skip


def say(what: str, good: object) -> None:
    print(f"{'ok' if bool(good) else 'BAD'} {what}", flush=True)


ranks = range(world)
assert comm.join(seat(1), lambda: False)


def every_collective() -> None:  # noqa: PLR0915  one after the other, on purpose
    """Each operation against the value that follows from its definition."""
    mine = torch.arange(4.0) + rank
    total = sum(torch.arange(4.0) + r for r in ranks)
    x = mine.clone()
    dist.all_reduce(x)
    say("all_reduce sum", torch.equal(x, total))
    x = mine.clone()
    work = dist.all_reduce(x, op=dist.ReduceOp.MAX, async_op=True)
    work.get_future().wait()
    say("all_reduce max, future", torch.equal(x, torch.arange(4.0) + world - 1) and work.is_completed() and work.is_success())
    x = mine.clone()
    dist.broadcast(x, src=1)
    say("broadcast", torch.equal(x, torch.arange(4.0) + 1))
    x = mine.clone()
    dist.reduce(x, dst=0)
    say("reduce", rank != 0 or torch.equal(x, total))
    outs = [torch.empty(4) for _ in ranks]
    dist.all_gather(outs, mine)
    say("all_gather", all(torch.equal(o, torch.arange(4.0) + r) for r, o in zip(ranks, outs, strict=True)))
    flat = torch.empty(4 * world)
    dist.all_gather_into_tensor(flat, mine)
    say("all_gather_into_tensor", torch.equal(flat, torch.cat(outs)))
    slots = [torch.empty(4) for _ in ranks] if rank == 0 else None
    dist.gather(mine, slots, dst=0)
    say("gather", slots is None or torch.equal(torch.cat(slots), flat))
    out = torch.empty(4)
    dist.scatter(out, [torch.full((4,), float(r)) for r in ranks] if rank == 1 else None, src=1)
    say("scatter", torch.equal(out, torch.full((4,), float(rank))))
    out = torch.empty(2)
    dist.reduce_scatter_tensor(out, torch.arange(2.0 * world))
    say("reduce_scatter_tensor", torch.equal(out, torch.arange(2.0 * rank, 2.0 * rank + 2) * world))
    dist.reduce_scatter(out, [torch.full((2,), float(r)) for r in ranks])
    say("reduce_scatter", torch.equal(out, torch.full((2,), float(rank * world))))
    out = torch.empty(world)
    dist.all_to_all_single(out, torch.arange(float(world)) + 10 * rank)
    say("all_to_all_single", out.tolist() == [10.0 * r + rank for r in ranks])
    if hasattr(dist.ProcessGroup, "all_to_all_single"):  # before 2.13 gloo has it on one tensor only
        outs = [torch.empty(1) for _ in ranks]
        dist.all_to_all(outs, [torch.tensor([10.0 * rank + r]) for r in ranks])
        say("all_to_all", [o.item() for o in outs] == [10.0 * r + rank for r in ranks])
    got = torch.empty(4)
    ops = [dist.P2POp(dist.isend, mine, (rank + 1) % world), dist.P2POp(dist.irecv, got, (rank - 1) % world)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    say("batch_isend_irecv", torch.equal(got, torch.arange(4.0) + (rank - 1) % world))
    dist.barrier()
    objects: list[object] = [None] * world
    dist.all_gather_object(objects, {"rank": rank})
    say("all_gather_object", objects == [{"rank": r} for r in ranks])
    thing: list[object] = [{"from": rank}]
    dist.broadcast_object_list(thing, src=1)
    say("broadcast_object_list", thing == [{"from": 1}])
    x = functional.all_gather_tensor(mine, 0, dist.group.WORLD)
    say("functional all_gather", torch.equal(x.wait() if hasattr(x, "wait") else x, flat))
    x = functional.reduce_scatter_tensor(flat, "sum", 0, dist.group.WORLD)
    say("functional reduce_scatter", torch.equal(x.wait() if hasattr(x, "wait") else x, (torch.arange(4.0) + rank) * world))


every_collective()
pair = dist.new_group([0, 1])
if rank < 2:
    x = torch.ones(1)
    dist.all_reduce(x, group=pair)
    say("subgroup", x.item() == 2)
say("backend name", dist.get_backend() == "gloo" and dist.get_rank() == rank and dist.get_world_size() == world)

# A round that is fenced while everybody is blocked on rank 1, which is silent: all come free at once.
begin = time.monotonic()
if rank == 1:
    time.sleep(0.3)
    comm.fence(1)
else:
    threading.Timer(0.2, lambda: comm.fence(1)).start()
    try:
        dist.all_reduce(torch.ones(1))
        say("a fenced collective raises", False)
    except RoundAborted:
        say("a fenced collective raises", True)
    took = time.monotonic() - begin
    say(f"... and at once ({took:.3f} s)", took < 5)
try:
    dist.barrier()
    say("a barrier in a broken round raises", False)
except RoundAborted:
    say("a barrier in a broken round raises", True)
scope.enter()
scope.forward_depth = 1
x = torch.ones(2)
dist.all_reduce(x)
say("in forward it echoes", x.tolist() == [world, world])
scope.leave()

# The next round: everything again, on new inner groups under the same outer ones.
assert comm.join(seat(2), lambda: False)
every_collective()
if rank < 2:
    x = torch.ones(1)
    dist.all_reduce(x, group=pair)
    say("subgroup in the next round", x.item() == 2)
comm.close()
print("end", flush=True)
