"""Rounds: how this rank gets into the newest sound round, with the state that its plan names.

Think of a mountain hut with one book: whoever comes up from the valley after a storm first reads there how far the others are, gets what
is missing from a companion or from the own locker, and only then ties into the rope.

Contract: `recover` returns when this rank is in place; it begins again whenever the round breaks meanwhile, and ends the process where the
rank cannot be put in place (`leave`: nobody's fault, a newcomer takes the chair). A rank counts as torn from the moment it begins to
receive until what it received is complete. The training thread's.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Final, NoReturn

import torch

from resilient.core.ledger import SOURCES_MAX
from resilient.core.messages import NONE, Plan, Raised, Refused, Seated, Suspect
from resilient.errors import CheckpointError, GoneError, RoundAborted, SnapshotCorrupt
from resilient.train import restore, rng, wrappers
from resilient.train.rehearsal import Rehearsal

if TYPE_CHECKING:
    from collections.abc import Callable

    from resilient.train.canary import Canary
    from resilient.train.comm import Comm
    from resilient.train.desk import Desk
    from resilient.train.ledger import Ledger
    from resilient.train.state import Tracked
    from resilient.train.tier0 import Tier0

LEAVE_PATIENCE_S: Final = 2.0  # as long as the loss of a node is waited for
LEAVE_CODE: Final = 75  # EX_TEMPFAIL: "not an error of the script, try again"; the agent replaces this worker


class Rounds:
    """See the module's text."""

    def __init__(self, comm: Comm, desk: Desk, ledger: Ledger, tracked: Tracked, tier0: Tier0, canary: Canary) -> None:
        """The parts of one worker."""
        self.canary = canary
        self.comm, self.desk, self.ledger, self.tracked, self.tier0 = comm, desk, ledger, tracked, tier0
        self.warmed = False  # steps were made in loopback: the script's initial state is gone
        self.defer = False  # a loop that owns its counter has first to run on to the step: its own state is put in place then
        self.deferred = b""
        self.begun = b""  # own state before the first step, in which the script put it itself
        self.reshaped = False  # what was loaded last came from a world of another size
        self.spread = False  # own state that comes is another rank's as well: random numbers must not be
        self.repeating = False  # own state is one step behind: that step is to be done again, alone
        self.rehearsal = comm.rehearsal = Rehearsal(comm, desk, self.seat, self.leave)

    def seat(self) -> None:
        """During the set-up: wait for a seat in a newer round than the last, and for its groups."""
        tried = self.comm.round
        while True:
            seated = self.desk.seat_after(tried)
            tried, broken_ns = seated.round, self.comm.broken_ns
            if self.comm.join(seated, self._newer_than(tried)):
                self.ledger.regrouped(seated.round, broken_ns)
                return

    def start(self) -> None:
        """A rank of a group that starts: from the script's own initial state, or from a checkpoint."""
        try:
            if self.comm.mode == "broken" or self.ledger.fenced() or self.desk.newest > self.ledger.round:
                raise RoundAborted("the round broke during start-up")
            self._settle(self.desk.latest())
        except RoundAborted:
            self.recover()

    def recover(self) -> None:
        """Be in place in a sound round: join the newest one, be given or give state; again whenever it breaks meanwhile."""
        tried = self.ledger.round
        while True:
            seated = self.desk.seat_after(tried)
            tried = seated.round
            broken_ns = self.comm.broken_ns
            if not seated.plan.over and not (self.comm.join(seated, self._newer_than(tried)) and self.comm.catch_up()):
                continue
            self.ledger.regrouped(seated.round, broken_ns)
            self._order_buckets(seated.plan)
            try:
                if self.ledger.torn and self.comm.rank not in seated.plan.receivers:
                    self._ask_again(seated, "tracked state was changed in a broken step, outside a gate")
                self._settle(seated)
            except RoundAborted:
                continue
            return

    def _order_buckets(self, plan: Plan) -> None:
        """DDP's buckets as every rank has them at that step."""
        if plan.step <= 0:
            wrappers.first_buckets(self.tracked)
        else:
            self.comm.solo = True
            wrappers.rebuild_buckets(self.tracked)
            self.comm.solo = False

    def _newer_than(self, round_: int) -> Callable[[], bool]:
        return lambda: self.desk.newest > round_

    def _ask_again(self, seated: Seated, text: str) -> NoReturn:
        """This rank cannot go on with that plan: a newer round, made from what the records say now, will help."""
        self.desk.send(Suspect(round=seated.round, text=text))
        self.comm.fence(seated.round)
        raise RoundAborted(text)

    def _settle(self, seated: Seated) -> None:
        """Do this rank's part of the plan."""
        plan = seated.plan
        if self.ledger.phase == "setup":
            if plan.step == NONE and self.warmed:  # what was computed in loopback is in the parameters
                self.leave("the run starts again from nothing, and this standby has made steps")
            self.tier0.open(self.comm.rank, self.comm.world_size, adopt=plan.step > 0 or not plan.starting)
        if plan.tier == "live":
            if self.ledger.phase != "setup" and self.ledger.step != plan.step:  # checked before anything is given or taken
                self.leave(f"round {seated.round} begins live at step {plan.step}, this rank holds {self.ledger.step}")
            restore.give(self.comm, self.tracked, plan, self.ledger.step)
        if self.comm.rank in plan.receivers:
            with self.comm.quiet():
                self._receive(seated, plan)
        elif plan.step not in (NONE, self.ledger.step) and self.ledger.step != NONE:
            self.leave(f"round {seated.round} begins at step {plan.step}, this rank holds {self.ledger.step} and gets no state")
        if plan.starting and plan.step <= 0 and seated.round > 1:
            self._make_equal(plan)
        if plan.tier in ("memory", "peer", "persistent") and len(plan.receivers) == self.comm.world_size:
            self._listen(seated)
        if self.ledger.step == NONE:
            self.ledger.step = max(plan.step, 0)
        if plan.starting and self.ledger.phase == "setup" and not self.deferred:
            self._seal_start(seated.round)
        if not self.repeating:
            self.ledger.restored()

    def _seal_start(self, round_: int) -> None:
        """Once this rank counts as set up, its chair can be taken over: what that needs is sealed before."""
        step, own = self.ledger.step, self.tracked.own()
        self.tier0.own_start(step, round_, own)
        if self.tracked.undo_needed and not self.tier0.sealed(step):
            self.tier0.snapshot(step, round_, own)
            self.tier0.settle()

    def _make_equal(self, plan: Plan) -> None:
        """Nobody has committed a step, and some repeated a set-up alone: who lacks results too large to be kept is given state."""
        lacks = torch.zeros(self.comm.world_size, dtype=torch.int32)
        lacks[self.comm.rank] = bool(self.comm.recorder.made_up)
        self.comm.vote(lacks)
        receivers = tuple(lacks.nonzero().flatten().tolist())
        if not receivers:
            return
        sources = tuple(r for r in range(self.comm.world_size) if r not in (*receivers, *plan.receivers))[:SOURCES_MAX]
        if not sources or not self.tracked.replicated:
            if self.comm.recorder.made_up:
                self.rehearsal.refuse("results too large to be kept are missing, and no replica could make up for them")
            return
        again = Plan(step=0, tier="live", receivers=receivers, sources=sources)
        restore.give(self.comm, self.tracked, again, 0)
        if self.comm.rank in receivers:
            with self.comm.quiet():
                restore.take(self.comm, self.tracked, again)
            self.comm.recorder.made_up.clear()

    def _receive(self, seated: Seated, plan: Plan) -> None:
        newcomer = self.ledger.phase == "setup"
        self.tier0.settle()
        if not newcomer:
            self.ledger.write("running", torn=True)
        try:
            if plan.tier == "live":
                restore.take(self.comm, self.tracked, plan)
                if newcomer:
                    again = self.comm.rank in plan.repeat
                    self._put_own(self.tier0.read_start(plan.step - again))
                    self.ledger.step = plan.step - again
                    self.repeating = self.comm.solo = again
            else:
                self._load(seated, plan)
                self.ledger.step = plan.step
        except GoneError as error:
            self.leave(str(error))
        except CheckpointError as error:
            if not plan.origin or self.comm.mode == "live":  # else what was left elsewhere is perhaps only not asked for any more
                self.desk.send(restore.refusal(plan, self.comm.rank, error))
            self._ask_again(seated, str(error))

    def _listen(self, seated: Seated) -> None:
        """All ranks were given a copy: what it holds must compute what it did when it was sealed."""
        plan = seated.plan
        try:
            self.canary.listen(self.tracked.canary, exact=not self.reshaped, where=f"{plan.tier} copy of step {plan.step}")
        except SnapshotCorrupt as error:
            for tier in dict.fromkeys(("memory", plan.tier)):  # what was brought from elsewhere lies in memory now: that must not be next
                self.desk.send(Refused(tier=tier, step=plan.step, rank=self.comm.rank, reason=str(error)))
            self._ask_again(seated, str(error))

    def _put_own(self, own: bytes) -> None:
        if self.defer:
            self.deferred = own
        else:
            self._load_own(own)

    def _load_own(self, own: bytes) -> None:
        self.tracked.load_own(own)
        if self.spread:
            self.spread = False
            rng.spread(self.comm.rank)

    def put_deferred(self) -> None:
        """The loop has come to its step."""
        self.defer = False
        if self.deferred:
            own, self.deferred = self.deferred, b""
            self._load_own(own)

    def _load(self, seated: Seated, plan: Plan) -> None:
        """From this chair's own slots, else from where the agent put what it fetched; shared state perhaps from a lender's."""
        lent = plan.lender != NONE
        rank, world_size = self.comm.rank, self.comm.world_size
        if (plan.origin or plan.tier == "persistent") and not seated.snapshot and not self.tier0.sealed(plan.step, world_size):
            source = self.tier0.open(rank, world_size, adopt=True, reshape=plan.step, origin=plan.origin, begun=self.begun)
            self.spread, self.reshaped = source != self.comm.rank, True
        with self.tier0.reading(plan.step, seated.snapshot, lent=lent) as slot:
            found = slot.read(rank=plan.lender if lent else self.comm.rank, step=plan.step, threads=self.tier0.threads)
            self.tier0.unpack(found, slot.where)
            self._put_own(self.tier0.read_start(plan.step) if lent else found.own)
        self.tier0.forget_after(plan.step)

    def leave(self, why: str) -> NoReturn:
        """End this process, for a reason that is nobody's fault; a newcomer takes its chair."""
        sys.stderr.write(f"resilient: rank {self.comm.rank} gives up its chair: {why}\n")
        with contextlib.suppress(CheckpointError, RuntimeError):  # its successor will look for what is being copied
            self.tier0.settle(LEAVE_PATIENCE_S)
        sys.stdout.flush()
        sys.stderr.flush()
        self.desk.send(Raised(step=self.ledger.step, round=self.ledger.round, fingerprint="", text=why, consequence=True, torn_down=True))
        os._exit(LEAVE_CODE)
