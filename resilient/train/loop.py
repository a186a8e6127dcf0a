"""The loop: begins steps, gates what changes state, commits or replays, recovers.

Think of a mountain rope team. Nobody pulls up until everybody has a grip (the vote at the gate); then all pull (the optimizer), and
only at the ledge (the boundary) is the new height written down. If the rope goes slack anywhere before the vote, everyone climbs
back to the last ledge and does the same pitch again, with whoever has taken the missing place.

A step's life: begin -> body in forward and backward -> gate: own state sealed, vote -> optimizers -> boundary: commit -> begin ...
A **vote** is one all-reduce over a group of our own, once per step, at the first gate, or at the boundary if no gate was reached (a step
that GradScaler skipped). That it passed says that every rank has had all collectives before its gate. So of survivors either
all are before the vote, and replay; or some are past it, and those who voted and did not hear run their optimizer too when told.
A newcomer whose own state is one step old **repeats** that step alone, in loopback with the gate shut: at its gate it is given the own
state that its predecessor sealed there, so that only what comes after the gate (scheduler, scaler) is really executed.

Contract: the training thread's. Leaves the process only where said: `leave` ends a worker that cannot be put back, so that it is replaced.
Used in two forms: `run.steps` (train/run.py) and `@resilient.step` (train/step.py).
"""

from __future__ import annotations

import functools
import sys
import time
from typing import TYPE_CHECKING, Any, Final

import torch

from resilient.core.messages import NONE, Marked, Sealed
from resilient.errors import RoundAborted, SnapshotMissing, UsageError
from resilient.train import wrappers
from resilient.train.canary import Canary
from resilient.train.gates import Gates
from resilient.train.rounds import Rounds
from resilient.train.sealing import CHECKPOINT, Sealing
from resilient.wire.page import UNCOPIED

if TYPE_CHECKING:
    from collections.abc import Callable

    from resilient.train.comm import Comm
    from resilient.train.desk import Desk
    from resilient.train.ledger import Ledger
    from resilient.train.scope import Scope
    from resilient.train.state import Tracked
    from resilient.train.tier0 import Tier0
    from resilient.wire.page import Page

WARMUP_STEPS: Final = 3  # DDP rebuilds its buckets in the second, with a broadcast; the third is as all later ones
WARMUP_MIN: Final = 2
_IN_BODY, _AT_BOUNDARY = b"g", b"b"  # first byte of an own state sealed at a gate: which one it was
UNASKED: Final = 1 << 62


class Loop:
    """See the module's text."""

    def __init__(
        self,
        *,
        comm: Comm,
        scope: Scope,
        desk: Desk,
        page: Page,
        ledger: Ledger,
        tracked: Tracked,
        tier0: Tier0,
        checkpoint_every: int | None,
        snapshot_every: int | None = None,
        audit_every_s: float = 0.0,
    ) -> None:
        """checkpoint_every: steps between two snapshots for the persistent tier; 0 = those that the page asks for, None = and the last.

        snapshot_every: steps between two snapshots in memory of sharded state; None = as often as it is worth it.
        audit_every_s: between two comparisons of replicas; 0 = none.
        """
        self.comm, self.scope, self.desk, self.page, self.ledger, self.tracked = comm, scope, desk, page, ledger, tracked
        self.tier0, self.checkpoint_every = tier0, checkpoint_every
        self.sealing = Sealing(page, tier0, every=snapshot_every, checkpoint_every=checkpoint_every or 0, audit_every_s=audit_every_s)
        self.opened = False
        self.over = False  # the loop's end was reached together
        self.canary = Canary()
        scope.loaded = page.loaded
        self.rounds = Rounds(comm, desk, ledger, tracked, tier0, self.canary)
        self.warming = WARMUP_STEPS if desk.standby else 0
        self.pending: dict[str, Any] = {}  # run.log: numbers, and tensors of one element that nobody has read yet
        self.effects: list[Callable[[], Any]] = []  # run.on_commit
        self._late: list[Callable[[], Any]] = []  # of the step before, which may yet be rolled back
        self.committers: list[Callable[[], None]] = []  # replayable iterators
        self.calls = 0  # of a function decorated with @resilient.step that are complete
        self.gates = Gates(self)
        self._own = b""
        self._versions: list[int] = []
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []  # what the body of a repeated step may change and must not
        self._gate_own = b""  # to be loaded at the boundary of the step that is repeated
        self._asked = UNASKED  # what the page asked for up to this step was done, or is not this rank's to do

    @property
    def sound(self) -> bool:
        """Whether what this step computes will count, as far as is known here."""
        if self.warming or self.rounds.repeating or self.scope.spoiled:
            return False
        return (self.scope.active and self.scope.open) or not self.broken  # past an open gate a step commits, whatever breaks

    @property
    def undo_needed(self) -> bool:
        """Whether only a snapshot can put back what a broken step may leave, or a lost rank takes with it."""
        return self.tracked.undo_needed or self.scope.late_backward

    @property
    def broken(self) -> bool:
        """Whether the round of the step under way is broken."""
        return self.comm.mode == "broken" or self.ledger.fenced()

    # ------------------------------------------------------------------ opening

    def open(self) -> None:
        """Before the first step: everything is tracked; a rank takes its seat, a standby begins to warm up."""
        if self.opened:
            return
        if not self.tracked.modules and not self.tracked.optimizers:
            msg = "run.steps before run.track: call run.track(model=..., optimizer=..., ...) first, so that a broken step can be put back"
            raise UsageError(msg)
        self.opened = True
        self.rounds.begun = self.tracked.own()
        if self.desk.standby and self.desk.newest and self.desk.latest().plan.starting:
            self.rounds.rehearsal.enlist()
        if self.desk.standby:
            self.rounds.warmed = True
        else:
            self.warming, self.desk.eager = 0, True
        self.comm.recorder.close()
        for module in self.tracked.modules.values():
            self.scope.watch(module)
        self.gates.close_over(self.tracked)
        if not self.warming and self.desk.latest().plan.step > 0:
            # Resumed: DDP's buckets must be as they were at that step, for the order of a sum is seen in its last bit
            self.warming, self.rounds.warmed, self.comm.solo = WARMUP_MIN, True, True
        if not self.warming:
            self._start()

    # ------------------------------------------------------------------ one step

    def next_step(self, total: int | None) -> int | None:
        """Begin the next step and return its number; None when `total` steps are done on every rank."""
        if self.warming:
            self._begin(0)
            return 0
        while not self.over and total is not None and self.ledger.step >= total and not self.rounds.repeating:
            self.finish()
        if self.over:
            return None
        self._begin(self.ledger.step)
        return self.ledger.step

    def _begin(self, step: int) -> None:
        self.scope.enter()
        self.page.beat()
        if self.rounds.repeating:  # shared state is that of the end of this step already
            self._kept = [(tensor, tensor.detach().clone()) for tensor in self.tracked.by_hand()]
        if self.warming or self.rounds.repeating:
            return
        self._versions, self.tracked.canary = self.tracked.versions(), None
        self._own = self.tracked.own()
        self.tier0.own_start(step, self.ledger.round, self._own)
        self.ledger.write("running")
        if self.page.copied() != UNCOPIED:
            self.desk.send(Sealed())

    def end_step(self) -> bool:
        """The body ended. True: the step is committed; False: it will be done again (or was not a real one)."""
        if self.warming:
            self.scope.leave()
            self.warming -= 1
            if self.desk.standby and self.desk.newest and self.warming <= WARMUP_STEPS - WARMUP_MIN:
                self.warming = 0  # a chair waits for this newcomer
            self.tracked.forget_warmup()
            if self.warming:
                return False
            if self.desk.standby:
                self._park()
            else:
                self.comm.solo = False
                self._start()
            return False
        if not self.scope.gated:
            self.scope.open = self.gate(boundary=True)
        elif self.rounds.repeating and self._gate_own:
            self.tracked.load_own(self._gate_own)
        self.scope.leave()
        if self.rounds.repeating:
            self._repeated()
            return False
        if self.scope.open:
            self._commit()
            return True
        self._undo()
        return False

    def excuse(self, error: BaseException) -> bool:
        """The body was left by `error`. True: a consequence of the broken round, `end_step` will replay; False: let it go up."""
        if self.warming or not (self.broken or self.rounds.repeating or isinstance(error, RoundAborted)):
            return False
        if self.scope.open:  # changed already, and its end is missing: what comes after the gate cannot be made up for here
            self.rounds.leave(f"step {self.ledger.step}: the round broke between the optimizer and the end of the step")
        if self.rounds.repeating:
            self.rounds.leave(f"step {self.ledger.step}: it could not be repeated alone")
        self.scope.gated = True  # no vote at the boundary: the step is lost
        return True

    def left(self) -> None:
        """The loop was left by break, return or an exception. Out of a broken step nothing may come: this worker is replaced.

        In a sound one all ranks are expected to leave; nobody waits for the others, for they may be in a collective that never ends.
        """
        self.over = True
        if self.warming or self.rounds.repeating:
            self.rounds.leave("the script left its loop before this process had taken its chair")
        if self.scope.active and self.broken and not self.scope.open:
            self.rounds.leave(f"step {self.ledger.step}: the script left the loop in a broken step")
        self.tier0.settle()
        if self.scope.active and self.scope.open:  # it voted: the step commits on every rank
            self.scope.leave()
            self.ledger.committed(self.ledger.step + 1)
            self._publish()
            self._settled()

    # ------------------------------------------------------------------ gate and vote

    def gate(self, *, boundary: bool = False) -> bool:
        """The first gate of the step: whether the optimizers may run. Blocks for the vote, or for the coordinator's word.

        boundary: the body is over and no gate was met in it (GradScaler found an overflow, say).
        """
        self.scope.gated = True
        if self.warming:
            return True
        if self.rounds.repeating:
            self._load_gate(boundary=boundary)
            return False
        if self.broken:
            return False
        if self.comm.kind == "nccl":
            torch.cuda.synchronize()  # the host runs ahead: every collective of this step must have ended well
        step, round_ = self.ledger.step, self.ledger.round
        self.tier0.settle()  # who votes has sealed what was begun at the last boundary; and it is changed from here on
        if self.tracked.replicated:  # copies lag by one step: what was sealed when this one began had all of it to get to another node
            self.sealing.await_copies(step, lambda: self.broken)
        elif self.sealing.certain(step + 1, sharded=True):
            self.sealing.await_newest(lambda: self.broken)
        if self.sealing.certain(step + 1, sharded=self.undo_needed):
            self.sealing.await_audit(lambda: self.broken)
        self.tier0.own_gate(step + 1, round_, (_AT_BOUNDARY if boundary else _IN_BODY) + self.tracked.own())
        self.ledger.write("voted")
        asked = self._asked < self.page.wanted() <= step + 1
        own_wish = self.sealing.wish(step + 1, rank=self.comm.rank, sharded=self.undo_needed, asked=asked, twins=self.tracked.twins > 1)
        wish = torch.tensor([own_wish], dtype=torch.int32)
        try:
            self.comm.vote(wish)
        except RoundAborted:
            return self._decided(step, round_)
        self.ledger.write("committing")
        if self.ledger.fenced():
            return self._decided(step, round_)
        heard = int(wish.item())
        self.scope.snapshot, self.scope.checkpoint = self.sealing.passed(heard), heard == CHECKPOINT
        self._settled()
        return True

    def _load_gate(self, *, boundary: bool) -> None:
        """What the predecessor's own state was at this gate, if that is known: where its node is lost the copy may be missing.

        Then the own state that the repeat has computed stands; of it, only module buffers may depend on the parameters, which are a step
        ahead here.
        """
        try:
            own = self.tier0.read_gate(self.ledger.step + 1)
        except SnapshotMissing:
            if self.tracked.has_buffers:
                text = f"module buffers of step {self.ledger.step + 1} were computed again, not copied"
                sys.stderr.write(f"resilient: rank {self.comm.rank}: {text}\n")
            return
        where, own = own[:1], own[1:]
        if where == _AT_BOUNDARY and not boundary:
            self._gate_own = own  # the predecessor met its gate only there: what comes until then happens once more, and does not count
        else:
            self.tracked.load_own(own)

    def _decided(self, step: int, round_: int) -> bool:
        """Voted, and the round broke: wait for the coordinator to say whether the step counts.

        I1 holds for the answer as well: if that newer round is fenced before `committing` can be seen, the next answer counts.
        """
        while True:
            seated = self.desk.seat_after(round_)
            self.sealing.told(seated.plan.kept)
            commits = seated.plan.step == step + 1
            self.ledger.write("committing" if commits else "running")
            if self.page.fence() < seated.round:
                return commits
            round_ = seated.round

    # ------------------------------------------------------------------ boundary

    def _commit(self) -> None:
        step = self.ledger.step + 1
        due = self._due(step)
        if due:
            self.tracked.canary = self.canary.sing()
        unheard = self.scope.checkpoint is None  # what the vote said: others may seal this step, or not
        if self.scope.snapshot or due or (unheard and self.undo_needed):
            self._seal(step, self.tracked.own(), alike=not unheard)
        self.ledger.committed(step)
        if due:
            self.tier0.once_sealed(functools.partial(self._sealed, step))
        if self.sealing.audit == step:
            self.tier0.once_sealed(functools.partial(self.desk.send, Sealed(audit=step)))
        self._publish()
        self.scope.since_ns = time.monotonic_ns()
        if self.broken:
            self._recover()

    def _due(self, step: int) -> bool:
        """Whether what is sealed at `step` goes to the persistent tier: by the interval, by the vote, or by the page alone.

        The vote makes them all seal the same step, whoever of them has heard of it. Where its result is not known (this rank was told to
        commit, or repeats the step alone) the page says the same, if the word was there in time; if not, it is asked for at the next vote.
        """
        if self.checkpoint_every and step % self.checkpoint_every == 0:
            return True
        voted = self.scope.checkpoint  # a word that came to this page since then would be this rank's alone
        return self._asked < self.page.wanted() <= step if voted is None else voted

    def _seal(self, step: int, own: bytes, *, alike: bool) -> None:
        self.tier0.snapshot(step, self.ledger.round, own)
        self.sealing.sealed(step, alike=alike)

    def _sealed(self, step: int) -> None:
        """The agent sees that this snapshot is to be brought to the persistent tier. On the thread that has sealed it."""
        self._asked = max(self._asked, step)
        self.page.sealed(step, int(self.tier0.cost_s * 1e9))
        self.desk.send(Sealed())

    def _publish(self) -> None:
        """Effects that were held back until the commit.

        Where a rollback to the snapshot before is possible, that is where some rank's shard of this step may never be sealed, they wait
        for the next vote: it passes only when every rank has this step behind it.
        """
        for commit in self.committers:
            commit()
        effects, self.effects = self.effects, []
        if self.pending:
            effects.insert(0, functools.partial(self._mark, self.ledger.step, self.pending))
            self.pending = {}
        if self.undo_needed:
            self._late = effects
        else:
            _run(effects)

    def _mark(self, step: int, scalars: dict[str, Any]) -> None:
        self.desk.send(Marked(step=step, scalars={name: float(value) for name, value in scalars.items()}))

    def _settled(self) -> None:
        """A vote passed: the step before is behind every rank."""
        late, self._late = self._late, []
        _run(late)

    def _undo(self) -> None:
        """Back to the start of the step: own state, gradients; whoever finds shared state changed is torn. Then into the next round."""
        if not wrappers.settled(self.tracked):
            self.rounds.leave(f"step {self.ledger.step}: FSDP's modules cannot be reset after a forward without backward")
        self.pending, self.effects = {}, []
        self.tracked.forget_scales()
        self.tracked.load_own(self._own)
        if self.tracked.versions() != self._versions:
            self.ledger.write("running", torn=True)
        self._recover()

    def _repeated(self) -> None:
        self.rounds.repeating = False
        with torch.no_grad():
            for tensor, value in self._kept:
                tensor.copy_(value)
        self._kept, self._gate_own = [], b""
        self.comm.solo = False
        self.pending, self.effects = {}, []
        for param in self.tracked.trained():  # None or zero, as the body's own zero_grad left them
            if param.grad is not None:
                param.grad.zero_()
        self.tracked.forget_scales()
        self.ledger.step += 1
        self._own = self.tracked.own()
        self.tier0.own_start(self.ledger.step, self.ledger.round, self._own)
        self.ledger.restored()
        due = self._due(self.ledger.step)
        if self.undo_needed or due:
            self._seal(self.ledger.step, self._own, alike=False)
        if due:
            self.tier0.once_sealed(functools.partial(self._sealed, self.ledger.step))
        if self.broken:
            self._recover()

    # ------------------------------------------------------------------ rounds

    def _park(self) -> None:
        """A standby is warm: wait for a chair, and take it."""
        self.page.park(parked=True)
        self.desk.eager = True
        self.desk.seat_after(0)
        self.page.park(parked=False)
        self.desk.standby = False
        self._recover()

    def _recover(self) -> None:
        """Into the newest sound round. Whoever was given an older state drops the effects of the step that it no longer holds."""
        held = self.ledger.step
        self.rounds.recover()
        self.scope.since_ns = 0
        self._placed()
        if self.ledger.step < held:
            self._late = []

    def _start(self) -> None:
        """Into the first round that stands."""
        self.rounds.start()
        self._placed()

    def _placed(self) -> None:
        """Checkpoints that were asked for up to here are made; of a later one, made in a future that will not be, nobody knows any more."""
        self.sealing.placed(self.ledger.step, self.desk.latest().plan.kept)
        if self._asked > self.ledger.step:
            self._asked = self.ledger.step
            self.page.sealed(NONE)

    # ------------------------------------------------------------------ the end

    def finish(self) -> None:
        """All steps are done here: seal them, and wait until they are on every rank; a fault meanwhile is recovered from."""
        step = self.ledger.step
        own = self.tracked.own()
        self.tier0.own_start(step, self.ledger.round, own)
        if not self.tier0.sealed(step):
            self._seal(step, own, alike=True)
            self.tier0.settle()
        if self.checkpoint_every is None and self._asked < step:
            self._sealed(step)
        if self.page.copied() != UNCOPIED:
            self.desk.send(Sealed())
        self.sealing.await_copies(step, lambda: self.broken)
        try:
            if self.broken:
                raise RoundAborted("the round broke at the end of the loop")
            if not self.desk.latest().plan.over:
                self.comm.vote(torch.zeros(1, dtype=torch.int32))
        except RoundAborted:
            self._recover()
            return
        self._settled()
        self.over = True
        self.ledger.write("done")

    def end(self) -> None:
        """The script is at its end: whoever left the loop early, or owns its counter, waits here for the others."""
        if self.warming:
            self.rounds.leave("a standby's script ended before its warm-up did")
        while not self.over:
            self.check_calls()
            self.finish()

    def check_calls(self, number: int | None = None) -> None:
        """A loop that owns its counter cannot go back with the run: it begins anew in another process. number: of the call under way."""
        if self.ledger.step < (self.calls if number is None else number):
            self.rounds.leave(f"step {self.ledger.step}: the run went back, and the script's own loop is further")


def _run(effects: list[Callable[[], Any]]) -> None:
    for effect in effects:
        effect()
