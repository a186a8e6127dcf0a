"""Training that saves its state now and then, by one of several engines.

    stalled.py ENGINE FOLDER [--steps N] [--every K] [--width W] [--layers L] [--batch B] [--flips F]

ENGINE: `resilient` (under resilient-run, whose flags say where and how often), or one of engines.py, nvrx.py, dlrover_flash.py.
FOLDER gets `times-RANK.json`: what training.py measures; for each save when it was safe (not for `resilient`: the run's own events tell);
seconds of a load from the cold disk, or from where else it was; and of F loads after one bit of what is loaded was flipped, how many were
refused and how many gave other tensors than were saved without a word (`resilient`: of its memory; test_integrity.py does the disk).
"""

from __future__ import annotations

import importlib
import json
import pathlib
import random
import statistics
import sys
import time

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException  # a BaseException
from training import RANK, WORLD, Training, arguments, mapped

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from limits import LOADS, cold, memcpy_s

MODULES = {"nvrx": "nvrx", "dlrover": "dlrover_flash"}


def under_resilient(training, args):
    """Returns what else was measured."""
    import resilient

    run = resilient.init()
    run.track(model=training.model, optimizer=training.optimizer)
    snapshots, tier0 = [], run.loop.tier0
    for _ in run.steps(args.steps):
        snapshots.append((run.loop.sealing.newest, tier0.cost_s))  # the newest one, before the first step and behind each but the last
        training.step()
    training.over()
    with tier0.reading(args.steps, "") as slot:
        found = {"snapshots": snapshots, "restores": restores(tier0, slot, args.steps), **flipped(slot, args)}
    return {**found, "memcpy_s": after_a_body(training, tier0.threads)}


def after_a_body(training, threads):
    """Seconds of one pass of memcpy over as many bytes, where a snapshot has its place: the caches, the clock of the cores are the body's."""
    bodies, training.bodies = training.bodies, []
    found = memcpy_s(training.found()["state_bytes"], threads, before=training.step)
    training.bodies = bodies
    return found


def restores(tier0, slot, step):
    """Seconds to verify and load a snapshot from memory, a few times."""
    found = []
    if not slot.is_stamped():
        slot.stamp_payload()  # the agent would have
    for _ in range(3):
        begin = time.perf_counter()
        snapshot = slot.read(step=step, threads=tier0.threads)
        tier0.unpack(snapshot, slot.where)
        found.append(time.perf_counter() - begin)
        assert snapshot.stamped
        del snapshot
    return found


def flipped(slot, args):
    """What becomes of bits that are flipped in a snapshot in memory."""
    from resilient.errors import CheckpointError

    draw, refused = random.Random(7), 0
    for _ in range(args.flips):
        at, bit = draw.randrange(slot.sealed_bytes()), 1 << draw.randrange(8)
        slot.memory[at] ^= bit
        try:
            slot.read(step=args.steps)
        except CheckpointError:
            refused += 1
        slot.memory[at] ^= bit
    return {"flips": args.flips, "refused": refused, "wrong": args.flips - refused}


def under_a_peer(training, args):
    """Returns what else was measured."""
    if WORLD > 1:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found = importlib.import_module(MODULES.get(args.engine.partition("-")[0], "engines"))
    engine = found.ENGINES[args.engine](training, args.folder)
    for step in range(1, args.steps + 1):
        training.step(engine.ready)
        engine.turn()
        if step % args.every == 0:
            engine.wait()  # as their users do: one save at a time
            engine.save(step)
    training.over()
    engine.wait()
    safe, last = dict(engine.safe), max(engine.safe)
    if args.flips:
        last = args.steps + 1  # of the state as it stays
        engine.save(last)
        engine.ready()
        engine.wait()
    more = loads(engine, last, args.flips) if WORLD == 1 else {}
    dist.barrier()
    engine.close()
    dist.destroy_process_group()
    return {"safe": safe, "where": engine.where, **more}


def loads(engine, step, flips):
    """A load, and what becomes of flipped bits."""
    taken = []
    for _ in range(LOADS):
        cold(engine.files(step))
        begin = time.perf_counter()
        found = engine.load(step)
        taken.append(time.perf_counter() - begin)
        assert not flips or same(found, engine.training.state())
        del found
    draw = random.Random(7)
    refused = wrong = 0
    for _ in range(flips):
        path = draw.choice(engine.files(step))
        at, bit = draw.randrange(path.stat().st_size), 1 << draw.randrange(8)
        flip(path, at, bit)
        try:
            wrong += not same(engine.load(step), engine.training.state())
        except (Exception, CheckpointException) as error:  # noqa: BLE001 - whatever it says of it, it has noticed
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            refused += 1
        flip(path, at, bit)
    return {"load_s": statistics.median(taken), "flips": flips, "refused": refused, "wrong": wrong}


def flip(path, at, bit):
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ bit]))


def same(one, other):
    """Whether they have the same tensors, bit for bit."""
    theirs = listed(other)
    return len(listed(one)) == len(theirs) and all(map(torch.equal, listed(one), theirs))


def listed(state):
    found = []
    mapped(state, found.append)
    return found


def main():
    """See the module's text."""
    args = arguments()
    training = Training(args)
    more = under_resilient(training, args) if args.engine == "resilient" else under_a_peer(training, args)
    (args.folder / f"times-{RANK}.json").write_text(json.dumps(training.found(**more)))


if __name__ == "__main__":
    main()
