"""Whatever the records and copies say, the plan is one that can be carried out, and the best of those."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from resilient.core.ledger import Account, Copy, choose, claim
from resilient.core.messages import NONE, Record

STEPS = st.integers(0, 4)


@st.composite
def copies(draw):
    held = draw(st.lists(st.tuples(st.sets(STEPS, max_size=2), st.integers(NONE, 5), st.sets(STEPS, max_size=2)), max_size=2))
    return tuple(
        Copy(node=f"n{i}", seated=i == 0, own_steps=tuple(sorted(o)), gate_step=g, snapshots=tuple(sorted(s)))
        for i, (o, g, s) in enumerate(held)
    )


@st.composite
def accounts(draw):
    """Records as the vote allows them: claims differ by at most one, those behind wait in their gate."""
    step = draw(STEPS)
    forms = (
        [("running", step), ("clean", step), ("voted", step)]
        if draw(st.booleans())
        else [("voted", step), ("committing", step), ("clean", step + 1)]
    )
    replicated = draw(st.booleans())
    ranks = []
    for number in range(draw(st.integers(1, 5))):
        form = draw(st.one_of(st.none(), st.sampled_from(forms)))
        record = Record(round=1, phase=form[0], step=form[1], torn=draw(st.integers(0, 3)) == 0) if form else None
        initial = form is None and draw(st.booleans())
        ranks.append(Account(rank=number, record=record, replicated=replicated, initial=initial, copies=draw(copies())))
    return ranks


POISON = st.sets(st.tuples(st.sampled_from(["memory", "peer", "persistent", "live"]), STEPS, st.integers(0, 4)), max_size=3)


def held(account, poison):
    """Steps of which a sound snapshot of this rank exists."""
    bad = {s for t, s, r in poison if r == account.rank and t in ("memory", "peer")}
    return {s for c in account.copies for s in c.snapshots} - bad


@settings(max_examples=600, deadline=None)
@given(accounts(), st.sets(STEPS, max_size=3), POISON)
def test_the_plan_can_be_carried_out(ranks, committed, poison):
    choice = choose(ranks, committed, poison)
    plan = choice.plan
    sound = committed - {s for t, s, _ in poison if t == "persistent"}
    if choice.error:
        assert committed
        assert not sound
        return
    for account in ranks:  # I2: everybody can stand at plan.step
        record = account.record
        stays = record is not None and (
            claim(record) == plan.step or (record.phase == "voted" and record.step in (plan.step, plan.step - 1))
        )
        begins = account.initial and plan.step in (NONE, 0)
        assert account.rank in plan.receivers or choice.fresh or begins or (stays and not record.torn), (account, plan)
    if plan.tier == "live":  # I3
        assert plan.sources
        givers = [a.record for a in ranks if a.rank in plan.sources]
        assert all(r is not None and not r.torn for r in givers)
        assert not set(plan.sources) & set(plan.receivers)
        assert all(a.replicated for a in ranks)
        assert not any(t == "live" and s == plan.step for t, s, _ in poison)
    elif plan.tier == "memory":
        owned = {a.rank: {s for c in a.copies for s in c.own_steps} for a in ranks}
        if plan.lender == NONE:
            assert all(plan.step in held(a, poison) for a in ranks if a.rank in plan.receivers)
        else:
            assert plan.step in held(next(a for a in ranks if a.rank == plan.lender), poison)
            assert all(a.replicated and plan.step in owned[a.rank] for a in ranks if a.rank in plan.receivers)
    elif plan.tier == "persistent":
        assert plan.step in sound
    assert set(plan.repeat) <= set(plan.receivers)
    if plan.kept not in (NONE, plan.step):
        assert all(plan.kept in held(a, poison) for a in ranks)


@settings(max_examples=600, deadline=None)
@given(accounts(), st.sets(STEPS, max_size=3), POISON)
def test_nothing_is_lost_while_a_sound_copy_exists(ranks, committed, poison):
    """I5, by brute force: no step that every rank has a copy of is newer than the plan's, up to what the survivors hold."""
    choice = choose(ranks, committed, poison)
    if choice.error:
        return
    claims = [claim(a.record) for a in ranks if a.record is not None]
    top = max(claims) if claims else 9
    everywhere = set.intersection(*(held(a, poison) for a in ranks))
    sound = committed - {s for t, s, _ in poison if t == "persistent"}
    reachable = {s for s in everywhere if s <= top} | sound
    best = max(reachable, default=NONE)
    if claims and choice.plan.step == max(claims):
        return  # nothing can be better than what the farthest survivor holds
    assert choice.plan.step == best
    assert choice.fresh == (best == NONE)


@given(accounts())
def test_all_survivors_keep_everything_when_nobody_is_missing(ranks):
    whole = [a for a in ranks if a.record is not None and not a.record.torn]
    if whole:
        choice = choose(whole, ())
        assert choice.plan.step == max(claim(a.record) for a in whole)
        assert not choice.plan.receivers
