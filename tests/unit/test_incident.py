"""Phases are measured by the clock of the house where they happened."""

from __future__ import annotations

from resilient.core.cause import Seen
from resilient.core.incident import Incident, phases
from resilient.core.messages import Chair, Finding, Plan, Record, Report
from resilient.core.policy import Verdict


def report(node, acted, *marks):
    chairs = tuple(
        Chair(rank=i, local_rank=i, record=Record(round=2, step=3, regrouped_s=a, restored_s=b, committed_s=c))
        for i, (a, b, c) in enumerate(marks)
    )
    return Report(run="r", node=node, boot=1, seq=1, round=2, acted_s=acted, chairs=chairs)


def test_the_last_rank_counts_and_clocks_are_never_compared():
    reports = [report("n0", 1000.0, (1000.1, 1000.2, 1000.4)), report("n1", 5.0, (5.3, 5.35, 5.5))]
    regroup, restore, replay = phases(reports, 2)
    assert [round(x, 3) for x in (regroup, restore, replay)] == [0.3, 0.05, 0.15]
    assert phases(reports, 3) == (0.0, 0.0, 0.0)


def test_the_gravest_finding_is_the_cause_and_downtime_is_the_sum():
    incident = Incident(1, opened=50.0)
    watch, replace = Verdict(verdict="watch", why=""), Verdict(verdict="replace", why="")
    incident.take(Finding(seq=1, kind="suspect", rank=0), watch, "n0")
    incident.take(Finding(seq=2, kind="exit", rank=1, pid=7, age_s=0.25), replace, "n1")
    incident.take(Finding(seq=3, kind="exit", rank=2), replace, "n1")
    incident.decide(Plan(step=8, tier="memory"), 10, 50.5)
    incident.decide(Plan(step=7, tier="memory"), 8, 51.0)
    line = incident.close([report("n0", 0.0, (0.1, 0.2, 0.4))], 2, 60.0)
    assert (line.cause, line.rank, line.pid, line.node, line.verdict) == ("exit", 1, 7, "n1", "replace")
    assert (line.detect, line.decide, line.regroup, line.restore, line.replay) == (0.25, 1.0, 0.1, 0.1, 0.2)
    assert line.downtime_s == 1.65
    assert (line.restored_from, line.steps_lost) == ("memory", 3)


def test_a_consequence_is_not_the_cause():
    incident = Incident(1, opened=0.0)
    replace = Verdict(verdict="replace", why="")
    incident.take(Finding(seq=1, kind="exception", rank=0, consequence=True), replace, "n0")
    incident.take(Finding(seq=1, kind="exit", rank=1), replace, "n1")
    assert incident.cause == "exit"


def seen(kind, class_, at, node="n1", ranks=(1,), **facts):
    finding = Finding(seq=1, kind=kind, class_=class_, ranks=ranks, text="text", **facts)
    return Seen(at, node, finding, class_, "evict" if class_ == "replace" else "watch", f"class {class_}", proof=True)


def test_the_cause_may_come_last_and_its_consequences_are_counted():
    incident, watch, replace = Incident(1, opened=50.0), Verdict(verdict="watch", why=""), Verdict(verdict="replace", why="")
    incident.take(Finding(seq=1, kind="suspect", rank=0), watch, "n0")
    incident.explain([seen("nccl-error", "app-restart", 49.0, node="n0", ranks=(0,), count=200)])
    assert (incident.cause, incident.symptom) == ("nccl-error", "suspect")
    incident.take(Finding(seq=2, kind="exit", rank=1, pid=7), replace, "n1")
    assert incident.cause == "exit", "what explains the complaint does not explain the death"
    cause = seen("xid", "replace", 49.5, code="79", device="gpu:0", rank=1)
    assert incident.explain([cause])
    line = incident.close([], 2, 60.0)
    assert (line.cause, line.node, line.rank, line.device, line.class_, line.verdict) == ("xid", "n1", 1, "gpu:0", "replace", "evict")
    assert line.evidence[0] == "n1: xid 79 on gpu:0: text"
    assert line.consequences == 202
    assert cause.spent


def test_after_its_end_only_what_was_before_it_or_is_broken_explains_it():
    incident = Incident(1, opened=50.0)
    incident.take(Finding(seq=1, kind="exit", rank=1), Verdict(verdict="replace", why=""), "n1")
    incident.close([], 2, 60.0)
    before, after = seen("oom-host", "app-restart", 49.0), seen("oom-host", "app-restart", 61.0)
    broken = seen("xid", "replace", 61.0)
    assert incident.late([before, after, broken], 62.0, 30.0) == [before, broken]
    assert incident.late([before], 91.0, 30.0) == []
    assert incident.explain([before])
    assert incident.explained().cause == "oom-host"
    assert not after.spent


def test_evidence_is_bounded():
    incident = Incident(1, opened=50.0)
    incident.take(Finding(seq=1, kind="exit", rank=1), Verdict(verdict="replace", why=""), "n1")
    incident.explain([seen(f"kind-{i}", "cordon", 49.0, ranks=None) for i in range(500)])
    line = incident.close([], 2, 60.0)
    assert (len(line.evidence), line.consequences) == (16, 500)


def test_a_storm_does_not_hide_its_cause():
    incident = Incident(1, 0.0)
    incident.take(Finding(seq=1, kind="exit", rank=0), Verdict(verdict="replace", why=""), "n0")
    echoes = [Finding(seq=1, kind=f"k{i}", class_="app-restart", ranks=(0,)) for i in range(200)]
    incident.explain([Seen(0.1 * i, "n0", it, "app-restart", "watch", "", proof=False) for i, it in enumerate(echoes)])
    assert incident.culprit is not None
    assert incident.culprit.finding.kind == "k0"
    lost = Finding(seq=1, kind="xid", code="79", class_="replace", ranks=(0,))
    assert incident.explain([Seen(50.0, "n0", lost, "replace", "evict", "", proof=True)])
    assert incident.culprit.finding.kind == "xid"


def test_a_kill_from_outside_is_not_explained_by_an_exception_that_was_handled():
    for exit_code, cause in ((-9, "exit"), (1, "user-exc")):
        incident = Incident(1, 0.0)
        incident.take(Finding(seq=1, kind="exit", rank=0, exit_code=exit_code, text="gone"), Verdict(verdict="replace", why=""), "n0")
        wrote = Finding(seq=1, kind="user-exc", code="ValueError", class_="user", ranks=(0,))
        incident.explain([Seen(0.0, "n0", wrote, "user", "watch", "", proof=False)])
        assert incident.cause == cause
