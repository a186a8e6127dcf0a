"""What explains a failure, of all that was seen around it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from resilient.core.cause import Casebook, Seen, pick
from resilient.core.messages import Finding
from resilient.core.rules import Limits


def seen(kind, class_, node="n1", ranks=(1,), at=0.0, proof=True, **facts):
    return Seen(at, node, Finding(seq=0, kind=kind, class_=class_, ranks=ranks, **facts), class_, "watch", "", proof)


XID_79 = seen("xid", "replace", code="79")
OOM = seen("oom-host", "app-restart")
NODE = seen("edac", "cordon", ranks=None)
USER = seen("cuda-error", "user", proof=False)
LOG = seen("nccl-error", "app-restart", proof=False)


def test_of_several_what_is_broken_then_what_is_near_then_what_is_grave_then_what_was_first():
    failed = [("n1", 1)]
    assert pick(failed, []) is None
    assert pick(failed, [OOM, NODE, XID_79, USER]) is XID_79
    assert pick(failed, [NODE, OOM]) is OOM
    assert pick(failed, [USER, LOG]) is LOG
    assert pick(failed, [USER]) is USER
    later = seen("oom-host", "app-restart", at=1.0)
    assert pick(failed, [later, OOM]) is OOM


def test_what_is_broken_and_proven_explains_a_failure_anywhere():
    assert pick([("n0", 0)], [XID_79]) is XID_79
    assert pick([("n0", 0)], [seen("nccl-error", "replace", proof=False)]) is None
    assert pick([("n0", 0)], [OOM]) is None
    assert pick([("n0", 0)], [NODE]) is None


def test_a_programs_fault_explains_only_its_own_rank():
    assert pick([("n1", 0)], [USER]) is None
    assert pick([("n1", 0)], [seen("cuda-error", "user", ranks=None)]) is None


def test_a_child_of_a_worker_is_near_its_node():
    assert pick([("n1", 0)], [seen("oom-host", "app-restart", ranks=(), device="pid:77")]) is not None
    assert pick([("n1", 0)], [seen("xid", "app-restart", ranks=(), device="gpu:7")]) is None


def test_what_one_worker_met_explains_nothing_of_the_next():
    book = Casebook(Limits())
    book.note(seen("cuda-error", "user", at=10.0, worker="w1"))
    assert book.explain(("n1", 1), "w1", 11.0) is not None
    book.failed(("n1", 1), 11.0)
    assert book.explain(("n1", 1), "w2", 12.0) is None
    assert book.note(seen("cuda-error", "user", at=12.5, worker="w2")), "another one met it"
    assert book.explain(("n1", 1), "w2", 13.0) is not None
    assert book.explain(("n1", 1), "w3", 13.0) is None


def test_the_window_before():
    book = Casebook(Limits(before_s=30.0))
    book.note(seen("oom-host", "app-restart", at=10.0))
    assert book.explain(("n1", 1), "", 40.0) is not None
    assert book.explain(("n1", 1), "", 40.1) is None


def test_the_same_is_told_once_in_a_while():
    book = Casebook(Limits(before_s=30.0))
    fact = Finding(seq=0, kind="xid", code="79", device="gpu:0", class_="replace")
    assert book.news(fact, "n1", 0.0)
    assert not book.news(fact, "n1", 30.0)
    assert book.news(fact, "n2", 30.0)
    assert book.news(fact, "n1", 30.1)
    echo = [Finding(seq=0, kind="sxid", code=str(i), class_="replace", role="symptom") for i in range(500)]
    assert sum(book.news(it, "n1", 1.0) for it in echo) == 1


def test_shared_is_what_many_nodes_have_at_once():
    fact = Finding(seq=0, kind="ib-link", class_="replace")
    few = Casebook(Limits())
    assert [few.shared(fact, f"n{i % 2}", 0.0, 10) for i in range(6)] == [0] * 6
    many = Casebook(Limits())
    assert [many.shared(fact, f"n{i}", 0.0, 10) for i in range(4)] == [0, 0, 3, 4]
    large = Casebook(Limits())
    assert [bool(large.shared(fact, f"n{i}", 0.0, 100)) for i in range(21)] == [False] * 19 + [True] * 2
    slow = Casebook(Limits())
    assert [slow.shared(fact, f"n{i}", 61.0 * i, 10) for i in range(6)] == [0] * 6


classes = st.sampled_from(["user", "app-restart", "gpu-reset", "replace", "cordon"])
sights = st.builds(
    lambda class_, node, ranks, at, proof: seen("k", class_, node=f"n{node}", ranks=ranks, at=at, proof=proof),
    classes,
    st.integers(0, 2),
    st.one_of(st.none(), st.just(()), st.tuples(st.integers(0, 3))),
    st.floats(0.0, 30.0),
    st.booleans(),
)


@given(st.lists(sights, max_size=12), st.integers(0, 2), st.integers(0, 3))
def test_a_programs_fault_never_explains_anothers_failure(items, node, rank):
    found = pick([(f"n{node}", rank)], items)
    if found is not None and found.class_ == "user":
        assert (found.node, found.finding.ranks) == (f"n{node}", (rank,))
    broken = [it for it in items if it.proof and it.class_ in ("gpu-reset", "replace")]
    if broken:
        assert found is not None
        assert found.class_ in ("gpu-reset", "replace")
    assert pick([(f"n{node}", rank)], items[::-1]) is found or found is not None
