"""The training job of the process tests: small, quick, and full of what a careless recovery gets wrong.

    job.py --out DIR [--kind ddp|fsdp|hsdp] [--form for|with|decorated] [--steps N] [--features a,b,...] [--hold N]
    [--strike "rank:step:moment,..."]

Each rank writes DIR/digest-<rank>: a digest of every bit of its final state. A *strike* kills (or stops, or breaks) the rank itself at an
exact moment, once: a marker file in DIR keeps it from happening again in the replay. Moments:
    setup talk1 .. talk4 large built tracked   in the set-up, from its beginning to its end
    forward backward collective optimizer optimizer_end between loop_end   SIGKILL there
    stop:forward    SIGSTOP instead          spin:forward  an endless loop          raise:forward  an exception, once
    say:forward     prints $JOB_WORDS on stderr, then SIGKILL               hog:forward  takes memory until the kernel ends it
    always:forward  an exception, every time        leave:forward  the script leaves its loop
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import os
import pathlib
import random
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist
from torch import nn

import resilient
from resilient.checkpoint import behind, capture, movers
from resilient.train.loop import Loop
from resilient.train.tier0 import Tier0

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=pathlib.Path, required=True)
parser.add_argument("--kind", default="ddp")
parser.add_argument("--form", default="for")
parser.add_argument("--steps", type=int, default=12)
parser.add_argument("--pause", type=float, default=0.0, help="seconds slept in every forward, to make steps long enough to be hit")
parser.add_argument("--hold", type=int, default=-1, help="before this step every rank waits for the file DIR/go")
parser.add_argument("--features", default="")
parser.add_argument("--strike", default="")
parser.add_argument("--width", type=int, default=24)
args = parser.parse_args()
features = set(filter(None, f"{args.features},{os.environ.get('JOB_FEATURES', '')}".split(",")))  # of this run; of all that are started
args.out.mkdir(parents=True, exist_ok=True)

if "late" in features:  # snapshots are copied beside the body, and that takes longer than the body
    os.environ["RESILIENT_CAPTURE"] = "behind"
    dice, copied_at_once = random.Random(), movers._copy_small

    def copied_late(*move: int) -> None:
        if threading.current_thread().name.startswith(behind.THREAD):
            time.sleep(dice.uniform(0.001, 0.006))
        copied_at_once(*move)

    movers._copy_small = copied_late
if "unwaited" in features:  # sabotage: the gate lets optimizers change what is being copied
    gate, settle = Loop.gate, Tier0.settle

    def unwaited(loop: Loop, *, boundary: bool = False) -> bool:
        Tier0.settle = lambda *_: None
        try:
            return gate(loop, boundary=boundary)
        finally:
            Tier0.settle = settle

    Loop.gate = unwaited
if "unwatched" in features:  # and nobody notices
    capture.Watched.touched = lambda _: []

run = resilient.init()
rank = run.rank
strikes = []
for text in filter(None, args.strike.split(",")):
    who, when, moment = text.split(":", 2)
    if int(who) == rank:
        strikes.append((int(when), moment))
now = -1  # the step under way, for the hooks


def strike(moment: str) -> None:
    """Do what was asked for at this moment of this step, once."""
    for when, text in strikes:
        deed, _, place = text.rpartition(":")
        if place != moment or when != now or run.is_standby:
            continue
        marker = args.out / f"struck-{rank}-{when}-{text.replace(':', '-')}"
        if marker.exists() and deed != "always":
            continue
        marker.touch()
        match deed:
            case "":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "spin":
                while True:
                    pass
            case "say":
                print(os.environ["JOB_WORDS"], file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            case "hog":
                while not (args.out / "fenced-in").exists():
                    time.sleep(0.01)
                taken = []
                while True:
                    taken.append(bytearray(16 << 20))
            case "raise" | "always":
                raise ValueError(f"struck at step {now}")
            case "leave":
                raise SystemExit(0)


strike("setup")
agreed = torch.zeros(())
if "talk" in features:  # what the ranks agree upon before they build anything: of every kind, on groups of every size
    value = torch.arange(3.0) * (rank + 1)
    dist.all_reduce(value)
    strike("talk1")
    pair = dist.new_group([0, 1])
    if rank < 2:
        found = [torch.zeros(3) for _ in range(2)]
        dist.all_gather(found, value * (rank + 1), group=pair)
        strike("talk2")
        value = found[1]
    dist.broadcast(value, 0)
    words = [f"from {rank}" * 3] if rank == 1 else [None]
    dist.broadcast_object_list(words, 1)
    strike("talk3")
    part = torch.zeros(2)
    dist.reduce_scatter(part, list((torch.arange(2.0 * run.world_size) * (rank + 1)).split(2)))
    dist.barrier()
    strike("talk4")
    agreed = value.sum() * len(words[0] or "") + part.sum()
    agreed = agreed * 1e-3
if "objects" in features:  # of more bytes than a tensor that is kept
    words = [list(range(400_000))] if rank == 0 else [None]
    dist.broadcast_object_list(words, 0)
    agreed = agreed + len(words[0] or "") * 1e-6
if "async" in features:  # launched in another order on another rank: nobody may wait for one before the next
    pair = [dist.new_group(list(range(run.world_size))) for _ in range(2)]
    values = [torch.full((3,), float(rank + i)) for i in range(2)]
    order = (0, 1) if rank == 0 else (1, 0)
    for work in [dist.all_reduce(values[i], group=pair[i], async_op=True) for i in order]:
        work.wait()
    agreed = agreed + (values[0].sum() + 2 * values[1].sum()) * 1e-3
if "large" in features:  # more than is kept for newcomers
    large = torch.full((1 << 19,), float(rank + 1))
    dist.all_reduce(large)
    agreed = agreed + large[0]
    strike("large")
torch.manual_seed(7)
layers: list[nn.Module] = [nn.Linear(args.width, 31)]
if "bn" in features:
    layers.append(nn.BatchNorm1d(31))
layers += [nn.ReLU(), nn.Linear(31, 31)]
if "dropout" in features:
    layers.append(nn.Dropout(0.3))
layers += [nn.ReLU(), nn.Linear(31, 7)]
model: nn.Module = nn.Sequential(*layers)
middle = layers[2]


class Hooked(torch.autograd.Function):
    """Strikes in the middle of forward and backward."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        strike("forward")
        if args.pause:
            time.sleep(args.pause)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
        strike("backward")
        return grad


class Struck(nn.Module):
    """The model, with the hook in its middle."""

    def __init__(self, inner: nn.Sequential) -> None:
        super().__init__()
        self.first, self.rest = inner[:2], inner[2:]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rest(Hooked.apply(self.first(x)))


model = Struck(model)
with torch.no_grad():
    model.first[0].bias.add_(agreed)
if args.kind in ("fsdp", "hsdp"):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (run.world_size,))
    if args.kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, run.world_size // 2), mesh_dim_names=("replicate", "shard"))
    for layer in (model.first, model.rest):
        fully_shard(layer, mesh=mesh)
    net = fully_shard(model, mesh=mesh)
else:
    net = nn.parallel.DistributedDataParallel(
        model, find_unused_parameters="unused" in features, static_graph="static" in features, gradient_as_bucket_view="view" in features
    )

if "hook" in features:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

    net.register_comm_hook(None, fp16_compress_hook)

strike("built")
torch.manual_seed(100 + rank)  # dropout differs per rank
random.seed(rank)
params = list(net.parameters())
opt: torch.optim.Optimizer = torch.optim.Adam(params, lr=0.01)
tracked: dict[str, object] = {"model": net, "optimizer": opt}
second = None
if "two" in features:
    half = len(params) // 2
    opt = torch.optim.Adam(params[:half], lr=0.01)
    second = torch.optim.SGD(params[half:], lr=0.02, momentum=0.9)
    tracked.update(optimizer=opt, second=second)
sched = torch.optim.lr_scheduler.StepLR(opt, 3, 0.5) if "sched" in features else None
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=3) if "scaler" in features else None
average = torch.optim.swa_utils.AveragedModel(model) if "average" in features else None
ema = copy.deepcopy(model).requires_grad_(requires_grad=False) if "ema" in features else None


class Source:
    """A stateful data source: what it gives depends on how often it was asked."""

    def __init__(self) -> None:
        self.position = 0

    def batch(self) -> torch.Tensor:
        self.position += 1
        generator = torch.Generator().manual_seed(1000 * rank + self.position)
        return torch.randn(6, args.width, generator=generator)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


source = Source()
tracked["source"] = source
if sched is not None:
    tracked["sched"] = sched
if scaler is not None:
    tracked["scaler"] = scaler
if average is not None:
    tracked["average"] = average
if ema is not None:
    tracked["ema"] = ema
stream = run.replayable(i * 0.001 for i in range(10_000)) if "stream" in features else None
run.track(**tracked)
strike("tracked")

for optimizer in filter(None, (opt, second)):
    optimizer.register_step_pre_hook(lambda *_: strike("optimizer"))
    optimizer.register_step_post_hook(lambda *_: strike("optimizer_end"))


def await_collective() -> None:
    """To be hit inside a collective: the victim goes ahead into its all-reduce, the others come later, and a timer strikes between."""
    for text in filter(None, args.strike.split(",")):
        who, when, moment = text.split(":", 2)
        if moment.endswith("collective") and int(when) == now and not run.is_standby:
            if int(who) == rank:
                threading.Timer(0.1, lambda: strike("collective")).start()
            elif not (args.out / f"struck-{who}-{when}-{moment.replace(':', '-')}").exists():
                time.sleep(0.3)


def body(step: int) -> float:
    """One step."""
    global now  # noqa: PLW0603  the hooks read it
    now = int(step)
    with run.section("hold"):
        while now == args.hold and not run.is_standby and not (args.out / "go").exists():
            time.sleep(0.01)
    await_collective()
    if "clamp" in features and now >= args.steps // 2:  # the body's own change of what is the optimizer's, first seen half-way
        with torch.no_grad():
            for param in params:
                param.mul_(0.999)
    parts = 2 if "accum" in features else 1
    total = 0.0
    for part in range(parts):
        x = source.batch()
        noise = random.random() + (next(stream) if stream is not None else 0.0)
        sync = part == parts - 1 or args.kind != "ddp"
        context = net.no_sync() if not sync else torch.enable_grad()
        with context:
            loss = (net(x + noise) ** 2).mean() / parts
            (scaler.scale(loss) if scaler is not None else loss).backward()
        total += loss.item()
    if "delay" in features and rank == 0:
        time.sleep(0.15)
    if "reduce" in features:
        value = torch.tensor(total)
        dist.all_reduce(value)  # before the gate, after backward
        total = value.item()
    if "clip" in features:
        if scaler is not None:
            scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
    if "early" in features and not run.sound:
        return 0.0
    for optimizer in filter(None, (opt, second)):
        if scaler is not None:
            scaler.step(optimizer)
        else:
            optimizer.step()
    if scaler is not None:
        scaler.update()
    if sched is not None:
        sched.step()
    if average is not None:
        average.update_parameters(model)
    if ema is not None:
        with torch.no_grad():
            for kept, fresh in zip(ema.parameters(), model.parameters(), strict=True):
                kept.lerp_(fresh, 0.1)
    for optimizer in filter(None, (opt, second)):
        optimizer.zero_grad(set_to_none="zeros" not in features)
    run.log(loss=total)
    run.on_commit(lambda: (args.out / f"committed-{rank}").open("a").write(f"{step}\n"))
    strike("between")
    return total


if args.form == "decorated":
    train_step = resilient.step(body)
    for number in range(args.steps):
        train_step(number)
elif args.form == "with":
    for step in run.steps(args.steps):
        with step:
            body(step)
            if "after" in features:
                dist.all_reduce(torch.ones(1))  # a collective outside of forward, backward and gate
else:
    for step in run.steps(args.steps):
        body(step)
now = args.steps
strike("loop_end")


def digest() -> str:
    """Every bit of this rank's state."""
    sha = hashlib.sha256()

    def feed(value: object) -> None:
        match value:
            case torch.Tensor():
                local = value.to_local() if hasattr(value, "to_local") else value
                sha.update(str((local.dtype, tuple(local.shape))).encode())
                sha.update(local.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            case dict():
                for key in sorted(value, key=str):
                    sha.update(str(key).encode())
                    feed(value[key])
            case list() | tuple():
                for item in value:
                    feed(item)
            case _:
                sha.update(repr(value).encode())

    for name in sorted(tracked):
        feed(name)
        feed(tracked[name].state_dict())
    feed(torch.get_rng_state())
    feed(random.getstate())
    return sha.hexdigest()


if "linger" in features:  # something long to do at the end
    (args.out / f"over-{rank}").touch()
    while not (args.out / "end").exists():
        time.sleep(0.01)
(args.out / f"digest-{rank}").write_text(digest())
(args.out / f"pid-{rank}").write_text(str(os.getpid()))
dist.destroy_process_group()
