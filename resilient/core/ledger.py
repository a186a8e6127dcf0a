"""Ledger: from where everybody's state comes, given what every rank's record and copies say.

Think of a choir whose singers know how many pages they have turned. Somebody fell out; the others compare: most stand at the same page,
some have a finger under the leaf and wait for a nod. The farthest page that anybody has turned is where all go on, if everyone can be
brought there; else the last page that everyone has a copy of.

Contract: `choose` is pure. What it picks, in this order:
0. `none`: no rank has committed a step, and some have not come to their first: all hold, or will, what the script begins with.
1. `live`: all state is replicated, and each newcomer's own state of that step lies somewhere. Nothing is lost.
2. `memory` at the same step: each rank that needs state has a sealed snapshot of exactly that step, or its own state and, where shared
   state is replicated, the snapshot of any rank (`lender`). Nothing is lost.
3. `memory` or `persistent`, whichever is newer: a step of which every rank has a copy. All go back to it.
4. nothing was ever committed: the script starts again. (If all committed checkpoints are refused, that is an error, not a start.)
I2 all ranks begin the round at the same step. I3 no rank is given state that nobody holds, or that was refused.
I5 nothing is lost while a sound copy of it exists.

By the vote (train/step.py) the survivors' claims differ by at most one, and those behind wait in their gate: a plan at the higher step
tells them to run their optimizer, one at the lower step to replay. They need no copy.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Final

import msgspec

from resilient.core.messages import NONE, Msg, Plan, Record, TierName

SOURCES_MAX: Final = 64  # a plan names at most this many of the ranks that could give live state

Poison = tuple[TierName, int, int]  # (tier, step, rank) of a Refused


class Copy(Msg):
    """What one node's memory holds of one rank."""

    node: str
    seated: bool = False  # in the segments of the rank's own chair, where a worker finds it; else it must be fetched first
    native: bool = False  # as in Holding
    own_steps: tuple[int, ...] = ()
    gate_step: int = NONE
    snapshots: tuple[int, ...] = ()
    rebuilt: bool = False  # lies nowhere as it is: it would be put together from parity


class Account(Msg):
    """What is known of one rank after the fence."""

    rank: int
    record: Record | None = None  # of the worker that keeps the chair; None: the chair gets a newcomer
    replicated: bool = False
    initial: bool = False  # in its set-up, or about to begin it: it will hold what the script begins with, or say that it does not
    finished: bool = False  # exited after the loop; needs nothing, unless all go back
    copies: tuple[Copy, ...] = ()  # on living nodes
    doubted: bool = False  # most of its replicas hold something else: it gives state to nobody while somebody else can


class Choice(Msg):
    """A plan, or the reason why there is none."""

    plan: Plan = Plan()
    reached: int = NONE  # the newest step that every rank is known to have completed
    fresh: bool = False  # the script starts again on every rank
    why: str = ""
    error: str = ""

    @property
    def lost(self) -> int:
        """Steps completed by all ranks that must be done again."""
        return max(0, self.reached - max(self.plan.step, 0))


def claim(record: Record) -> int:
    """The step that this rank holds, or will hold when told to commit what it has begun."""
    return record.step + 1 if record.phase == "committing" else record.step


def choose(
    accounts: Sequence[Account],
    committed: Collection[int],
    poison: Collection[Poison] = (),
    elder: tuple[int, int] = (NONE, 0),
) -> Choice:
    """The plan for the next round. committed: steps with a commit marker on the persistent tier.

    elder: (step, ranks) of a world of another size that all lies in memory: every rank's state can be cut from it.
    """
    choice = _choose(accounts, committed, poison, elder)
    if choice.plan.step == NONE:
        return choice
    kept = _kept([_sound(a, poison) for a in accounts] if poison else accounts, choice.plan)
    return msgspec.structs.replace(choice, plan=msgspec.structs.replace(choice.plan, kept=kept))


def _choose(accounts: Sequence[Account], committed: Collection[int], poison: Collection[Poison], elder: tuple[int, int]) -> Choice:
    reached = min((s for a in accounts if (s := _known(a)) != NONE), default=NONE)
    accounts = [_sound(a, poison) for a in accounts] if poison else accounts
    records = [(a, a.record) for a in accounts if a.record is not None and a.record.phase != "setup"]
    if not records:
        back = _back(accounts, max((s for a in accounts for s in _snapshots(a)), default=NONE), reached, committed, poison, elder)
        if back.fresh and any(a.initial and a.record is not None for a in accounts):
            return Choice(reached=reached, why="no rank has come to its first step: those that live go on with their set-up")
        return back
    step = max(claim(r) for _, r in records)
    over = any(r.phase == "done" for _, r in records)  # the last vote passed: all are at `step`, and nobody meets in groups any more
    survivors = {a.rank: r for a, r in records if not a.finished}
    seated = [a for a in accounts if not a.finished]
    able = {rank for rank, r in survivors.items() if claim(r) == step or (r.phase == "voted" and r.step == step - 1)}
    able |= {a.rank for a in seated if a.initial and step == 0}
    newcomers = [a for a in seated if a.rank not in able]
    torn = {rank for rank in able if rank in survivors and survivors[rank].torn}
    receivers = tuple(sorted(torn | {a.rank for a in newcomers}))
    if not receivers:
        return Choice(plan=Plan(step=step, over=over), reached=reached, why=f"all ranks hold step {step}")
    whole = sorted(rank for rank in able - torn if rank in survivors)
    doubted = {a.rank for a in accounts if a.doubted}
    whole = [r for r in whole if r not in doubted] or whole
    sources = [r for r in whole if claim(survivors[r]) == step] or whole
    if sources and not over and all(a.replicated for a in seated) and not any(t == "live" and s == step for t, s, _ in poison):
        repeat = tuple(a.rank for a in newcomers if not _owns(a, step))
        if all(_repeats(a, step) for a in newcomers if a.rank in repeat):
            plan = Plan(step=step, tier="live", receivers=receivers, sources=tuple(sources[:SOURCES_MAX]), repeat=repeat)
            return Choice(plan=plan, reached=reached, why=f"{len(sources)} ranks hold step {step} live, own states are in memory")
    needy = frozenset(receivers)
    if all(step in _snapshots(a) for a in seated if a.rank in needy):
        plan = Plan(step=step, tier="memory", receivers=receivers, over=over)
        return Choice(plan=plan, reached=reached, why=f"snapshots of step {step} are in memory")
    _, lender = min(((a.doubted, a.rank) for a in accounts if step in _snapshots(a)), default=(False, NONE))
    if lender != NONE and all(a.replicated for a in seated) and all(_owns(a, step) for a in seated if a.rank in needy):
        plan = Plan(step=step, tier="memory", receivers=receivers, lender=lender, over=over)
        return Choice(plan=plan, reached=reached, why=f"rank {lender}'s snapshot of step {step} is in memory, and own states are")
    return _back(accounts, step, reached, committed, poison, elder)


def _back(
    accounts: Sequence[Account],
    newest: int,
    reached: int,
    committed: Collection[int],
    poison: Collection[Poison],
    elder: tuple[int, int],
) -> Choice:
    """Everybody goes back to the newest step, up to `newest`, of which every rank has a copy."""
    everyone = tuple(a.rank for a in accounts)
    memory = max((s for s in _common(accounts) if s <= newest), default=NONE)
    refused = {s for t, s, _ in poison if t == "persistent"}
    persistent = max((s for s in committed if s not in refused), default=NONE)
    step, tier = (memory, "memory") if memory >= persistent else (persistent, "persistent")
    if elder[0] > step:
        why = f"step {elder[0]} of a world of {elder[1]} ranks is in memory, whole"
        return Choice(plan=Plan(step=elder[0], tier="memory", receivers=everyone, origin=elder[1]), reached=reached, why=why)
    if step != NONE:
        plan = Plan(step=step, tier=tier, receivers=everyone)  # type: ignore[arg-type]
        return Choice(plan=plan, reached=reached, why=f"step {step} is the newest of which every rank has a copy ({tier})")
    if committed:
        steps = ", ".join(str(s) for s in sorted(refused & set(committed)))
        advice = "remove them, or give another URL, to start from nothing"
        return Choice(error=f"every committed checkpoint was refused (steps {steps}); {advice}")
    return Choice(reached=reached, fresh=True, why="no copy of any step exists for every rank: the script starts again")


def _known(account: Account) -> int:
    """The newest step that this rank is known to have completed."""
    held = (s for c in account.copies for s in (*c.own_steps, *c.snapshots))
    return max(account.record.step if account.record is not None else NONE, max(held, default=NONE))


def _kept(accounts: Sequence[Account], plan: Plan) -> int:
    """The newest step that all have in their own slots when the plan is carried out, and so keep."""
    loads = plan.receivers if plan.tier not in ("none", "live") and plan.lender == NONE else ()
    common: set[int] | None = None
    for account in accounts:
        held = {s for c in account.copies if c.seated for s in c.snapshots if s <= plan.step}
        if account.rank in loads:
            held.add(plan.step)
        common = held if common is None else common & held
        if not common:
            return NONE
    return max(common or (), default=NONE)


def _common(accounts: Iterable[Account]) -> set[int]:
    common: set[int] | None = None
    for account in accounts:
        held = _snapshots(account)
        common = held if common is None else common & held
        if not common:
            return set()
    return common or set()


def _snapshots(account: Account) -> set[int]:
    return {s for c in account.copies for s in c.snapshots}


def _owns(account: Account, step: int) -> bool:
    return any(step in c.own_steps for c in account.copies)


def _repeats(account: Account, step: int) -> bool:
    """Whether own state of one step before is there: good enough, the step is repeated with the gate shut.

    On the node itself the state at the gate is there too, for it was sealed before the vote; a copy on another node may lack it, and
    then what the body computes again stands (train/loop.py).
    """
    return any(step - 1 in c.own_steps for c in account.copies)


def _sound(account: Account, poison: Collection[Poison]) -> Account:
    """The account without what was refused: a copy that is bad in one memory is trusted in none."""
    bad = {s for t, s, r in poison if r == account.rank and t in ("memory", "peer")}
    if not bad:
        return account
    copies = tuple(
        Copy(
            node=c.node,
            seated=c.seated,
            native=c.native,
            own_steps=tuple(s for s in c.own_steps if s not in bad),
            gate_step=NONE if c.gate_step in bad else c.gate_step,
            snapshots=tuple(s for s in c.snapshots if s not in bad),
            rebuilt=c.rebuilt,
        )
        for c in account.copies
    )
    return msgspec.structs.replace(account, copies=copies)


def best_copy(account: Account, plan: Plan, near: str) -> Copy | None:
    """The copy that serves `plan`: the one in its chair's own segments, else one on the node `near`, else the first."""
    step = plan.step

    def serves(copy: Copy) -> bool:
        if plan.tier == "memory" and plan.lender == NONE:
            return step in copy.snapshots
        return step in copy.own_steps or (account.rank in plan.repeat and step - 1 in copy.own_steps)

    able = [c for c in account.copies if serves(c)]
    gated = plan.tier == "live"  # only who repeats a step looks at the gate
    return min(able, key=lambda c: (not c.seated, c.rebuilt, gated and c.gate_step != step, c.node != near, c.node), default=None)
