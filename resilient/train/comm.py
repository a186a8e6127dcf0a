"""Comm: all process groups of this process, and the round they are in.

Think of a telephone exchange. Lines are pulled out the moment the exchange hears that a round broke (`fence`); a new set is plugged
together in a back room (`prepare`, a builder's thread) while the callers still finish their sentence in loopback; they are switched over
together when they come to the desk (`join`, the training thread at a step's boundary).

Modes:  alone   a standby: every collective in loopback; before its first step small ones are recalled from the rank it shadows
        live    inner groups of `round` are in use
        broken  the inner groups are cut; loopback where the scope allows it, else RoundAborted

Contract: `run`, `join`, `add` belong to the training thread (autograd's threads may call `run`); `fence` and `prepare` to any thread.
A failure of an older round's operation never breaks a newer one.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Literal

import torch.distributed as dist

from resilient.core.messages import pair_name
from resilient.errors import RoundAborted
from resilient.train.build import Build
from resilient.train.group import _ECHO, Group, Held, Operation
from resilient.wire.page import CONTROL_SLOT, OVERFLOW_SLOT, group_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from resilient.core.messages import Seated
    from resilient.train.inner import Inner
    from resilient.train.recorder import Recorder
    from resilient.train.rehearsal import Rehearsal
    from resilient.train.scope import Scope
    from resilient.wire.page import Page

GRACE_S: Final = 5.0  # between the end of a round and the end of its groups


class Comm:
    """See the module's text."""

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        kind: str,
        scope: Scope,
        recorder: Recorder,
        page: Page | None = None,
        on_suspect: Callable[[int, str], None] = lambda _round, _text: None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        """kind: "gloo" or "nccl". on_suspect(round, text): called once per round when a collective fails here first."""
        self.rank, self.world_size, self.kind = rank, world_size, kind
        self.mode: Literal["alone", "live", "broken"] = "alone"
        self.solo = False  # a step is being repeated alone, whatever the round does meanwhile
        self.round = 0
        self.recorder = recorder
        self.rehearsal: Rehearsal | None = None  # makes the collectives before the first step; without one they are as all others
        self.broken_ns = 0
        self.groups: list[Group] = []
        self._scope, self._page, self._on_suspect, self._timeout = scope, page, on_suspect, timeout
        self._lock = threading.RLock()
        self._counts: dict[tuple[int, ...], int] = {}
        self._build: Build | None = None  # of the round in use
        self._next: Build | None = None  # being made
        self._given_up: list[Build] = []  # whose threads may not have come to their end
        # Votes and state go over a group of their own: a rank that votes while another is in the script's collective must make both wait
        # (a hang has a culprit), not meet it (gloo ends the process when sizes differ).
        everybody = tuple(range(world_size))
        self.control = Group(self, rank, everybody, "control", CONTROL_SLOT, "gloo")
        self.groups.append(self.control)
        self._slots = 0  # of the page that have an owner
        self._pairs: dict[tuple[int, int], int] = {}  # global ranks that send to each other -> slot
        if page is not None:
            page.name_group(CONTROL_SLOT, group_name("control"))

    # ------------------------------------------------------------------ groups

    def add(self, group_rank: int, ranks: tuple[int, ...]) -> Group:
        """Make the outer group of these global ranks; its inner group too, if a round is in force. Blocks like torch's new_group."""
        count = self._counts.get(ranks, 0)
        self._counts[ranks] = count + 1
        key = f"{'-'.join(map(str, ranks))}#{count}" if len(ranks) < self.world_size else f"world#{count}"
        group = Group(self, group_rank, ranks, key, self._slot(group_name(key)), self.kind)
        self.groups.append(group)
        if self.mode != "alone" and self._sets_up and self.rehearsal is not None:
            self.rehearsal.enter()
        elif self.mode == "live" and not self.catch_up():
            raise self._aborted(f"new_group {key}")
        return group

    def _slot(self, name: int) -> int:
        """Counters in the page for the group of this name, as long as there are any."""
        if self._slots == CONTROL_SLOT:
            return OVERFLOW_SLOT
        slot, self._slots = self._slots, self._slots + 1
        if self._page is not None:
            self._page.name_group(slot, name)
        return slot

    def pair(self, group: Group, peer: int) -> int:
        """The slot of what this rank and that member of `group` send to each other: two that speak alone do not count for the group."""
        ranks = (group.ranks[group.rank()], group.ranks[peer])
        if (slot := self._pairs.get(ranks)) is None:
            self._pairs[ranks] = slot = self._slot(pair_name(*ranks))
        return slot

    @property
    def _sets_up(self) -> bool:
        return self.recorder.mode != "off" and self.rehearsal is not None

    def catch_up(self) -> bool:
        """Make what groups are missing in the round in force, in the order of their making, as all members do. False: the round broke.

        One that the script has just made; or that a newcomer, who stands for a rank that died after it was made, comes to only now.
        """
        for group in self.groups:
            build = self._build
            if group.size() > 1 and group.inner is None and build is not None:
                try:
                    inner = build.make(group)
                except RuntimeError as error:  # of the store, which is shut when the round is fenced, or of gloo or nccl
                    self._suspect(build.round, f"group {group.key}: {error}")
                    return False
                group.inner = inner
        return self.mode == "live"

    # ------------------------------------------------------------------ operations

    def run(self, group: Group, op: Operation) -> Held:
        """Launch one operation, in whatever way the round allows. Only what is really launched is counted: loopback waits for nobody."""
        self.beat()
        if group.size() == 1:
            op.fill()
            return Held(group, op, None, None)
        if self._sets_up and self._set_up(op):
            self.beat()
            return Held(group, op, None, None)
        op.looped = self._scope.may_loop(echo=op.kind == _ECHO)
        if self.solo or self.mode == "alone":
            op.fill()
        elif self.mode == "live":
            return self._launch(group, op)
        elif op.looped:
            self._fill(op)
        else:
            raise self._aborted(op.key)
        return Held(group, op, None, None)

    def _launch(self, group: Group, op: Operation) -> Held:
        inner = group.inner
        assert inner is not None, f"group {group.key} has no inner group in live round {self.round}"
        if self._page is not None:
            self._page.enter(op.slot)
        try:
            work = op.launch(inner.group)
        except RuntimeError as error:  # gloo refuses at once when a pair is already broken
            self.left(group, inner, op.slot)
            aborted = self.failed(op, inner, error)
            if aborted is not None:
                raise aborted from error
            return Held(group, op, None, None)
        return Held(group, op, inner, work)

    def _set_up(self, op: Operation) -> bool:
        """Before the first step. Whether `op` is done with that."""
        assert self.rehearsal is not None, "see _sets_up"
        later = sys._getframe(4).f_locals.get("async_op") is True  # noqa: SLF001  of c10d's function: no argument tells the two apart
        if op.name in ("send", "recv") or later:
            return self.rehearsal.loose(op)
        self.rehearsal.perform(op)
        return True

    def failed(self, op: Operation, inner: Inner | None, error: RuntimeError) -> BaseException | None:
        """An operation ended with `error`. Fills it in loopback and returns None where that is allowed, else what to raise.

        Whoever gets an error drops its own inner groups, so that a neighbour who waits for *us* comes free too.
        """
        self.lost(inner, f"{op.key}: {error}")
        if not op.looped:
            return self._aborted(op.key)
        self._fill(op)
        return None

    def lost(self, inner: Inner | None, text: str) -> None:
        """Something went wrong on `inner`: if that is of the round in force, the round is broken. text: its first line is passed on."""
        with self._lock:
            current = any(group.inner is inner for group in self.groups)
            round_ = self.round
        if current and self.mode == "live":
            self._suspect(round_, text.splitlines()[0][:300])

    def _fill(self, op: Operation) -> None:
        """Loopback in a broken round."""
        self._scope.spoiled = self._scope.spoiled or self._scope.open
        op.fill()

    def vote(self, tensor: Any) -> None:
        """In-place maximum of `tensor` over all ranks, on the control group. Raises RoundAborted."""
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.MAX)
        self.direct("vote", lambda group: group.allreduce([tensor], options))

    def direct(self, what: str, launch: Callable[[Any], Any]) -> None:
        """`launch` on the control group's inner group and wait; never in loopback. Raises RoundAborted if the round is, or gets, broken."""
        group = self.control
        if group.size() == 1:
            return
        inner = group.inner
        if self.mode != "live" or inner is None:
            raise self._aborted(what)
        since = 0
        if self._page is not None:
            self._page.enter(group.slot)
            since = time.monotonic_ns()
        try:
            inner.wait(launch(inner.group))
        except RuntimeError as error:  # gloo's only way to say that a peer is gone
            if group.inner is inner:
                self._suspect(self.round, f"{what}: {str(error).splitlines()[0][:300]}")
            raise self._aborted(what) from error
        finally:
            self.left(group, inner, group.slot, since)

    def beat(self) -> None:
        """This process is alive and waits for something that is not a collective."""
        if self._page is not None:
            self._page.beat()

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Copying or checking much state: not a hang, as in a section of the user's."""
        if self._page is not None:
            self._page.section(1)
        try:
            yield
        finally:
            if self._page is not None:
                self._page.section(0)

    def left(self, group: Group, inner: Inner | None, slot: int, since_ns: int = 0) -> None:
        """An operation on `inner` ended, well or not; somebody waited for it since then."""
        if self._page is None:
            return
        if group.inner is inner:
            self._page.leave(slot, since_ns)
        else:
            self._page.abandon()

    def _aborted(self, what: str) -> RoundAborted:
        return RoundAborted(f"round {self.round} broke; {what} cannot be completed here")

    # ------------------------------------------------------------------ rounds

    def _suspect(self, round_: int, text: str) -> None:
        if self.fence(round_):
            self._on_suspect(round_, text)

    def fence(self, round_: int) -> bool:
        """Rounds up to `round_` are broken: cut every inner group. Returns whether that was news. Any thread."""
        with self._lock:
            if self._next is not None and self._next.round <= round_:
                self._next.cancel()
                self._given_up = [build for build in (*self._given_up, self._next) if build.is_alive()]
                self._next = None
            if self.mode != "live" or self.round > round_:
                return False
            self.mode = "broken"
            self.broken_ns = time.monotonic_ns()
            build = self._build
        if build is not None:
            build.cancel()
        return True

    def prepare(self, seated: Seated) -> None:
        """Begin to make the groups of a newer round. Any thread."""
        with self._lock:  # reentrant: two threads must not both begin, each member arrives once
            newest = max(self.round, self._next.round if self._next else 0)
            if seated.round <= newest:
                return
            self.fence(seated.round - 1)
            self._next = Build(seated, [g for g in self.groups if g.size() > 1], self._timeout)

    def join(self, seated: Seated, superseded: Callable[[], bool]) -> bool:
        """Switch over to the groups of `seated.round`; False if `superseded()` became true, or the build failed, before that.

        A failed build is reported as a suspicion about that round. Polls `superseded` every 20 ms besides being woken by the builder.
        """
        self.prepare(seated)
        with self._lock:
            build = self._next
        if build is None or build.round != seated.round:
            return False
        while not build.ready.wait(0.02):
            self.beat()  # waiting for a newcomer is no hang
            if superseded():
                return False
        if build.error or superseded():
            if build.error:
                self._on_suspect(seated.round, f"groups of round {seated.round}: {build.error.splitlines()[0][:300]}")
            return False
        with self._lock:
            if self._next is not build:  # fenced in between
                return False
            old = [group.inner for group in self.groups if group.inner is not None]
            if self._page is not None:
                self._page.regroup()
            for group in self.groups:
                group.inner = build.inners.get(group.key)
                group.agreed = build.settled.get(group.key, 0)
            previous, self._build, self._next = self._build, build, None
            self.round = seated.round
            self._sit(seated.rank)
            self.mode = "live"
        # gloo's destructor joins its threads: off the training thread, and never on gloo's own
        threading.Thread(target=_drop, args=(old, previous), name="resilient-drop", daemon=True).start()
        return True

    def _sit(self, rank: int) -> None:
        """Take the seat of `rank`: another than the one the script ran as only where it knows nothing of its rank (any_rank)."""
        if rank != self.rank:
            assert all(group.size() == self.world_size for group in self.groups), "another chair, but groups that depend on the rank"
            for group in self.groups:
                group.sit(rank)
            self.rank = rank

    def close(self) -> None:
        """The process ends: cut and drop the inner groups while the interpreter still stands (gloo's threads must be joined).

        A thread of ours that comes back from torch's C++ when it does not ends the process by SIGABRT.
        """
        with self._lock:
            self.mode = "broken"
            inners = [group.inner for group in self.groups if group.inner is not None]
            builds = [build for build in (self._build, self._next, *self._given_up) if build is not None]
        for inner in inners:
            inner.cut()
        for build in builds:
            build.cancel()
            build.join(timeout=5.0)
        time.sleep(0.05)  # see _drop; nothing is in flight at the end of a script but what its author forgot
        for build in builds:
            build.inners.clear()
        for group in self.groups:
            group.inner = None
        inners.clear()


def _drop(inners: list[Inner], build: Build | None) -> None:
    """Let go of a round that is over, once gloo's threads have let go of the last tensors.

    gloo's destructor joins its threads and is called with the GIL held; a thread that is about to free a tensor of ours wants the GIL. The
    operations have all failed when the round was cut, so what is left takes them microseconds; they are given seconds.
    """
    time.sleep(GRACE_S)
    if build is not None:
        build.cancel()
        build.inners.clear()
        build.store = None
    inners.clear()
