"""The run as a training script sees it.

Think of a ship's log with a helmsman: the script says what it does, step by step; the run knows where the ship is, brings it back to
the last sure position when a man goes overboard, and keeps what is to be told to the shore until the position is sure.

    run = resilient.init()
    run.track(model=net, optimizer=opt)
    for step in run.steps(10_000):
        loss = net(batch_of(step)).mean()
        loss.backward(); opt.step(); opt.zero_grad()
        run.log(loss=loss)

Contract: one run per process, all methods for the training thread. Without an agent (plain python, torchrun) everything works, and
nothing is recovered; `init` says so once.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import sys
import traceback
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from resilient.checkpoint.movers import Movers, threads_for
from resilient.core.messages import Join, Raised
from resilient.errors import ConfigError, RoundAborted, UsageError
from resilient.train import compiling
from resilient.train.backend import OverlayStore, install
from resilient.train.build import CONNECT_TIMEOUT
from resilient.train.comm import Comm
from resilient.train.desk import Desk
from resilient.train.ledger import Ledger
from resilient.train.loop import Loop
from resilient.train.recorder import Recorder
from resilient.train.replay import Replayable
from resilient.train.scope import Scope
from resilient.train.state import Tracked
from resilient.train.step import Step
from resilient.train.tier0 import Tier0
from resilient.wire.link import AgentLine
from resilient.wire.page import Page

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

_current: Run | None = None
_TEXT_MAX = 16 << 10


class Run:
    """What `resilient.init` returns."""

    def __init__(self, *, device: torch.device, loop: Loop | None, run_id: str, page: Page | None) -> None:
        """loop: None where nothing is recovered."""
        self.device = device
        self.loop = loop
        self.run_id = run_id
        self._page = page
        self._tracked = loop.tracked if loop is not None else Tracked()
        self._sections = 0
        self._replayables: list[Replayable[Any]] = []
        self._effects: list[Callable[[], Any]] = []

    # ------------------------------------------------------------------ facts

    @property
    def rank(self) -> int:
        """This process' chair, 0 .. world_size - 1; for a standby the one it shadows."""
        return self.loop.comm.rank if self.loop is not None else dist.get_rank()

    @property
    def world_size(self) -> int:
        """Number of chairs."""
        return self.loop.comm.world_size if self.loop is not None else dist.get_world_size()

    @property
    def local_rank(self) -> int:
        """The chair's number on this node."""
        return int(os.environ.get("LOCAL_RANK", "0"))

    @property
    def round(self) -> int:
        """The seating in force; grows with every recovery. 0 without an agent, and for a standby."""
        return self.loop.ledger.round if self.loop is not None else 0

    @property
    def is_standby(self) -> bool:
        """Whether this process warms up or is parked, without a chair of its own."""
        return self.loop is not None and self.loop.desk.standby

    @property
    def sound(self) -> bool:
        """Whether the step under way counts, as far as is known here: false in a broken step, a repeat, and on a standby."""
        return self.loop is None or self.loop.sound

    # ------------------------------------------------------------------ tracking and stepping

    def track(self, **things: Any) -> None:
        """Say what the run's state is: modules, optimizers, and anything with state_dict and load_state_dict.

        Give modules as they are called in the step (the DDP wrapper, not what is in it). Random number generators of torch, CUDA, numpy and
        `random` are tracked by themselves. Raises UsageError for an object whose state cannot be had, or after the first step.
        """
        if self.loop is not None and self.loop.opened:
            msg = f"run.track({', '.join(things)}): the first step has begun; track everything before"
            raise UsageError(msg)
        for name, thing in things.items():
            self._tracked.add(name, thing)
        compiling.announce(self)

    def steps(self, total: int | None = None) -> Iterator[Step]:
        """Yield the number of each step to do, 0-based, up to `total`; a broken step is yielded again.

        Starts after the last completed step of the run. Ends when `total` steps are complete on every rank.
        """
        if self.loop is None:
            number = 0
            while total is None or number < total:
                yield Step.of(number, None)
                self.publish()
                number += 1
            return
        if self.loop.over:
            msg = "run.steps: the run's loop is over; a run has one"
            raise UsageError(msg)
        self.loop.open()
        while True:
            step = self.loop.next_step(total)
            if step is None:
                return
            try:
                yield Step.of(step, self.loop)
            except GeneratorExit:
                self.loop.left()
                raise
            self.loop.end_step()

    def log(self, **scalars: Any) -> None:
        """Numbers of this step (floats, or tensors of one element), told when the step commits. Cheap: nothing is read before."""
        for name, value in scalars.items():
            if not isinstance(value, (int, float)) and not (isinstance(value, torch.Tensor) and value.numel() == 1):
                msg = f"run.log({name}=...): a number or a tensor of one element expected, {type(value).__name__} found"
                raise UsageError(msg)
        if self.loop is not None and self.loop.sound:
            for name, value in scalars.items():
                self.loop.pending[name] = value.detach() if isinstance(value, torch.Tensor) else value

    def on_commit(self, effect: Callable[[], Any]) -> None:
        """Call `effect` once the step under way is committed; never, if it is not."""
        if self.loop is None:
            self._effects.append(effect)
        elif self.loop.sound:
            self.loop.effects.append(effect)

    def guard(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, made to do nothing in a step that does not count: for changes of tracked state by hand, such as an EMA."""
        return call if self.loop is None else self.loop.gates.guard(call)

    def canary(self, function: Callable[[], Any]) -> None:
        """Have checkpoints tried before they are trained on: `function()` is one number (a loss) from a batch that the script has kept.

        Every rank calls it when a checkpoint is sealed, and again after all were given that checkpoint: if it gives another number, that
        one is refused and the one before it is taken. Without gradients; it may use collectives, and must not change tracked state.
        """
        if self.loop is None:
            return
        if self.loop.opened:
            msg = "run.canary: the first step has begun; call it before"
            raise UsageError(msg)
        self.loop.canary.function = function

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:  # noqa: ARG002  the name is for the reader, and for stacks
        """Something long and quiet (evaluation, saving): not a hang while it is open."""
        self._sections += 1
        if self.loop is not None:
            self.loop.scope.since_ns = 0  # what this takes was not spent on data
        if self._page is not None:
            self._page.section(self._sections)
        try:
            yield
        finally:
            self._sections -= 1
            if self._page is not None:
                self._page.section(self._sections)

    def replayable(self, source: Iterable[Any]) -> Iterator[Any]:
        """An iterator over `source` that gives the same items again when a step is replayed, and is brought forward on a newcomer."""
        if self.loop is not None and self.loop.opened:
            msg = "run.replayable: the first step has begun; make it before"
            raise UsageError(msg)
        iterator: Replayable[Any] = Replayable(source)
        self._tracked.add(f"replayable.{len(self._replayables)}", iterator)
        self._replayables.append(iterator)
        if self.loop is not None:
            self.loop.committers.append(iterator.committed)
        return iterator

    def publish(self) -> None:
        """Without recovery: a step ended."""
        for iterator in self._replayables:
            iterator.committed()
        effects, self._effects = self._effects, []
        for effect in effects:
            effect()


def current() -> Run | None:
    """The run of this process."""
    return _current


def init(backend: str | None = None, *, any_rank: bool = False) -> Run:
    """Join the run and initialise torch.distributed; in place of `dist.init_process_group`.

    backend: "gloo" or "nccl"; None = nccl where there is a GPU, else gloo. any_rank: the script computes nothing from its rank that a
    standby could not take over for another one (no seeds, shards, subgroups), so any standby may take any chair.
    Raises UsageError if called twice, ConfigError for an unknown backend, ProtocolError if the agent refuses this process.
    """
    global _current  # noqa: PLW0603  one run per process
    if _current is not None:
        msg = "resilient.init: this process has joined the run already"
        raise UsageError(msg)
    kind = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    if kind not in ("gloo", "nccl"):
        msg = f"resilient.init(backend={backend!r}): 'gloo', 'nccl' or None expected"
        raise ConfigError(msg)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    managed = "RESILIENT_SOCKET" in os.environ
    _current = _join(kind, device, os.environ, any_rank=any_rank) if managed else _alone(kind, device)
    return _current


def _alone(kind: str, device: torch.device) -> Run:
    if "RANK" in os.environ:
        dist.init_process_group(kind)
    else:
        dist.init_process_group(kind, store=dist.HashStore(), rank=0, world_size=1)
    if dist.get_rank() == 0:
        sys.stderr.write("resilient: no agent here (start with resilient-run); the script runs without recovery\n")
    return Run(device=device, loop=None, run_id=os.environ.get("TORCHELASTIC_RUN_ID", "none"), page=None)


def _join(kind: str, device: torch.device, env: Mapping[str, str], *, any_rank: bool) -> Run:
    standby = env["RESILIENT_ROLE"] == "standby"
    rank, world_size, run_id = int(env["RANK"]), int(env["WORLD_SIZE"]), env["RESILIENT_RUN_ID"]
    page = Page(env["RESILIENT_PAGE"])
    page.occupy()
    line = AgentLine.connect(env["RESILIENT_SOCKET"])
    desk = Desk(line, standby=standby)
    scope, ledger, tracked = Scope(), Ledger(page), Tracked()
    recorder = Recorder(rank, desk.send, "recall" if standby else "record")
    comm = Comm(
        rank=rank,
        world_size=world_size,
        kind=kind,
        scope=scope,
        recorder=recorder,
        page=page,
        on_suspect=desk.suspect,
    )
    desk.recorder = recorder
    movers = Movers(threads_for(int(env.get("LOCAL_WORLD_SIZE", "1"))))
    behind = env.get("RESILIENT_CAPTURE") == "behind"  # what a GPU has always, tried without one
    apart = None if (given := env.get("RESILIENT_SNAPSHOT_EVERY", "auto")) == "auto" else int(given)
    loop = Loop(
        comm=comm,
        scope=scope,
        desk=desk,
        page=page,
        ledger=ledger,
        tracked=tracked,
        tier0=Tier0(desk, tracked, run_id, movers, often=apart is not None, overlap=behind),
        checkpoint_every=None if (every := env.get("RESILIENT_CHECKPOINT_EVERY", "0")) == "auto" else int(every),
        snapshot_every=apart,
        audit_every_s=float(env.get("RESILIENT_AUDIT_EVERY_S", "0")),
    )
    desk.send(Join(worker=env["RESILIENT_WORKER"], pid=os.getpid(), token=env["RESILIENT_TOKEN"], any_rank=any_rank))
    desk.listen()
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False, wait_for_workers=False, timeout=CONNECT_TIMEOUT)
    user_store = dist.PrefixStore("user/", store)
    overlay = OverlayStore(user_store)
    loop.rounds.rehearsal.enlisted = overlay.open
    install(comm, overlay if standby else user_store)
    desk.comm = comm
    if not standby:
        loop.rounds.seat()
    atexit.register(comm.close)
    return Run(device=device, loop=loop, run_id=run_id, page=page)


def ended() -> None:
    """The script ran to its end without an exception: a loop that was left early, or that owns its counter, ends with the others."""
    if _current is not None and _current.loop is not None and _current.loop.opened:
        _current.loop.end()


def report_exit(error: BaseException) -> None:
    """Tell the agent, if this process joined a run, of an exception that ends it."""
    raised = verdict_of_exit(error)
    if raised is not None and _current is not None and _current.loop is not None:
        _current.loop.desk.send(raised)


def verdict_of_exit(error: BaseException) -> Raised | None:
    """What to tell the agent of an exception that ends this process; None if it never joined a run."""
    if _current is None or _current.loop is None:
        return None
    loop = _current.loop
    text = "".join(traceback.format_exception(error))
    return Raised(
        step=loop.ledger.step,
        round=loop.ledger.round,
        fingerprint=_fingerprint(error),
        text=text[-_TEXT_MAX:],
        consequence=isinstance(error, RoundAborted) or (loop.scope.active and loop.broken),
    )


def _fingerprint(error: BaseException) -> str:
    """Type, message without numbers, innermost frame: equal for the same mistake made again."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else "?"
    return f"{type(error).__name__}: {re.sub(r'[0-9]+', '#', str(error))[:200]} at {place}"
