"""From a finding to a wish: who is believed, and what is nobody's fault."""

from __future__ import annotations

import tomllib

import pytest
from msgspec.structs import replace

from resilient.core.crew import Crew, Findings
from resilient.core.crew import Place as Seat
from resilient.core.fleet import Node
from resilient.core.messages import Finding, Report
from resilient.core.placement import Place
from resilient.core.policy import TABLE
from resilient.core.triage import Triage, about, addresses
from resilient.rulebook import lay, shipped
from resilient.wire.frames import FRAME_BYTES_MAX, encode

PLACES = {0: Place(node="n0", local_rank=0, why=""), 1: Place(node="n1", local_rank=0, why=""), 2: Place(node="n1", local_rank=1, why="")}


def fleet(count=6):
    return {f"n{i}": Node(f"n{i}", i, Report(run="r", node=f"n{i}", boot=1, seq=1, host=f"10.0.0.{i}"), 0.0) for i in range(count)}


class Door:
    def __init__(self):
        self.triage, self.now, self.nodes = Triage(shipped(), "run"), 100.0, fleet()

    def __call__(self, kind, class_="", node="n1", probe="kernel-log", ranks=(1,), after=0.0, **facts):
        self.now += after
        finding = Finding(seq=1, kind=kind, class_=class_, probe=probe, ranks=ranks, **facts)
        return self.triage.take(finding, node, self.now, self.nodes, PLACES, len(self.nodes))

    @property
    def wishes(self):
        return {(w.node, w.verdict, w.local_ranks) for w in self.triage.cordons.wishes.values()}


@pytest.fixture
def door():
    return Door()


@pytest.mark.parametrize(
    ("class_", "verdict"),
    [("ignore", "ignore"), ("user", "watch"), ("app-restart", "watch"), ("gpu-reset", "evict"), ("replace", "evict"), ("cordon", "cordon")],
)
def test_a_class_has_its_verdict(door, class_, verdict):
    assert door("gsp", class_).verdict.verdict == verdict
    wished = {("n1", verdict, frozenset({0}))} if verdict in ("evict", "cordon") else set()
    assert door.wishes == wished


@pytest.mark.parametrize("role", ["symptom", "context", "cascade"])
@pytest.mark.parametrize("class_", ["gpu-reset", "replace", "cordon", "app-restart", "user", "ignore"])
def test_only_a_cause_moves_anybody(door, role, class_):
    assert door("gsp", class_, role=role).verdict.verdict in ("watch", "ignore")
    assert door.wishes == set()


def test_a_whole_node_and_nobody(door):
    door("edac", "replace", ranks=None, device="cpu:0")
    assert door.wishes == {("n1", "evict", None)}
    door("xid", "replace", ranks=(), device="gpu:7", code="79", node="n2")
    assert ("n2", "evict", frozenset()) in door.wishes


def test_hearsay_counts_together_with_a_failure(door):
    taken = door("nccl-error", "replace", probe="worker-log")
    assert taken.verdict.verdict == "watch"
    assert "if the worker fails" in taken.verdict.why
    assert door.triage.failed(("n0", 0), door.now) == []
    assert door.wishes == set()
    ((seen, verdict),) = door.triage.failed(("n1", 1), door.now)
    assert (seen.finding.kind, verdict.verdict) == ("nccl-error", "evict")
    assert door.wishes == {("n1", "evict", frozenset({0}))}


def test_or_the_failure_comes_first(door):
    door.triage.failed(("n1", 1), door.now)
    assert door("nccl-error", "replace", probe="worker-log", after=5.0).verdict.verdict == "evict"
    assert door("nccl-error", "replace", probe="worker-log", ranks=(2,), device="rank:2", after=1.0).verdict.verdict == "watch"


def test_hearsay_grows_old(door):
    door("nccl-error", "replace", probe="worker-log")
    assert door.triage.failed(("n1", 1), door.now + 31.0) == []
    assert door.wishes == set()


def test_an_unknown_probe_is_not_believed(door):
    assert door("gsp", "replace", probe="somebodys").verdict.verdict == "watch"
    assert door("gsp", "replace", probe="", device="gpu:0").verdict.verdict == "watch"


def test_a_threshold_counts_what_it_is_told(door):
    text = "[rule.a]\nkind = 'ib-errors'\nclass = 'cordon'\nthreshold = 3\nwindow_s = 600"
    door.triage = Triage(lay(shipped(), tomllib.loads(text), "mine.toml"), "run")

    def verdicts(times, **facts):
        return [door("ib-errors", probe="infiniband", ranks=None, **facts).verdict.verdict for _ in range(times)]

    assert verdicts(3, device="dev:mlx5_0", after=1.0) == ["watch", "watch", "cordon"]
    assert verdicts(3, node="n2", device="dev:mlx5_0", after=400.0) == ["watch"] * 3, "ten minutes are over"
    assert verdicts(1, node="n3", count=3) == ["cordon"]


def test_shared_is_nobodys_fault(door):
    verdicts = [door("ib-link", "replace", node=f"n{i}", probe="infiniband", ranks=None) for i in range(4)]
    assert [v.verdict.verdict for v in verdicts] == ["evict", "evict", "watch", "watch"]
    assert [bool(v.shared) for v in verdicts] == [False, False, True, False]
    assert "no node is to blame" in verdicts[-1].verdict.why
    assert door.wishes == set()
    assert door("ib-link", "replace", node="n5", probe="infiniband", ranks=None, after=59.0).verdict.verdict == "watch"
    assert door("ib-link", "replace", node="n5", probe="infiniband", ranks=None, device="dev:x", after=200.0).verdict.verdict == "evict"


def test_a_port_that_never_was_up_moves_nobody(door):
    assert door("ib-link", "ignore", probe="infiniband", ranks=None).verdict.verdict == "ignore"
    assert door.wishes == set()


def test_other_codes_are_other_faults(door):
    for i, code in enumerate(["48", "79", "95", "119"]):
        assert door("xid", "replace", node=f"n{i}", code=code).verdict.verdict == "evict"


def test_a_recovery_ends_it(door):
    door("ib-link", "replace", probe="infiniband", ranks=None, device="dev:mlx5_0")
    assert len(door.wishes) == 1
    taken = door("ib-link", "replace", probe="infiniband", ranks=None, device="dev:mlx5_0", clears=True)
    assert (taken.verdict.verdict, taken.seen, door.wishes) == ("ignore", None, set())


def test_a_users_fault_is_the_users_until_one_device_repeats_it(door):
    def crash(node, ranks, worker):
        return door("xid", "user", code="31", node=node, ranks=ranks, device="gpu:0", worker=worker, after=60.0).verdict

    assert [crash("n1", (1,), w).verdict for w in ("a", "b", "b")] == ["watch"] * 3
    assert crash("n1", (1,), "c").verdict == "cordon"
    assert crash("n0", (0,), "d").verdict == "watch"
    assert crash("n1", (1,), "e").verdict == "watch", "another device has it too: it is the program's"


@pytest.mark.parametrize(
    ("device", "node", "ranks"),
    [
        ("peer:10.0.0.2", "n2", None),
        ("peer:10.0.0.2<45678>", "n2", None),
        ("peer:10.0.0.2:45678", "n2", None),
        ("peer:n3", "n3", None),
        ("peer:2", "n1", (2,)),
        ("peer:99", "n0", (0,)),
        ("peer:10.9.9.9", "n0", (0,)),
        ("gpu:0", "n0", (0,)),
        ("peer:", "n0", (0,)),
        ("", "n0", (0,)),
    ],
)
def test_the_peer_that_is_named(device, node, ranks):
    found, finding = about(Finding(seq=1, kind="nccl-error", device=device, ranks=(0,), rank=0), "n0", addresses(fleet()), PLACES)
    assert (found, finding.ranks) == (node, ranks)


def test_a_rule_may_halt_what_the_runtime_finds():
    rules = lay(shipped(), tomllib.loads("[rule.sdc]\nkind = 'replicas_differ'\nverdict = 'halt'"), "mine.toml")
    differ, gone = Finding(seq=0, kind="replicas_differ"), Finding(seq=0, kind="exit")
    assert Triage(rules, "run").heed(differ, TABLE["replicas_differ"]).verdict == "halt"
    assert Triage(rules, "run").heed(gone, TABLE["exit"]) == TABLE["exit"]
    assert Triage(shipped(), "run").heed(differ, TABLE["replicas_differ"]) == TABLE["replicas_differ"]


def test_a_workers_word_moves_nobody_elsewhere(door):
    told = door("nccl-warn", "replace", node="n0", probe="worker-log", ranks=(0,), device="peer:n1")
    assert (told.node, told.verdict.verdict) == ("n1", "watch")
    assert door.triage.failed(("n1", 1), door.now) == []
    assert door("nccl-warn", "replace", node="n0", probe="worker-log", ranks=(0,), device="peer:n1").verdict.verdict == "watch"
    assert door.wishes == set()


def test_an_error_of_the_programs_own_bears_nothing_out(door):
    door("nccl-error", "replace", probe="worker-log")
    assert door.triage.failed(("n1", 1), door.now, unrelated=True) == []
    assert door.triage.failed(("n1", 1), door.now) == [], "its successor has not written that"
    door.now += 31.0
    assert door("ecc", "replace", probe="worker-log").verdict.verdict == "watch"
    assert door.wishes == set()


def test_a_successor_does_not_bear_out_what_its_predecessor_wrote(door):
    assert door.triage.failed(("n1", 1), door.now, worker="w1", unrelated=True) == []
    assert door("nccl-error", "replace", probe="worker-log", worker="w1").verdict.verdict == "watch", "read when it was gone"
    assert door.triage.failed(("n1", 1), door.now, worker="w2") == []
    assert door("ecc", "replace", probe="worker-log", worker="w1").verdict.verdict == "watch"
    assert door.wishes == set()
    assert door("ecc", "gpu-reset", probe="worker-log", worker="w2").verdict.verdict == "evict"


def test_a_recovery_that_a_worker_wrote_takes_back_its_words_alone(door):
    about_port = {"probe": "worker-log", "device": "dev:mlx5_0"}
    door("ib-link", "replace", probe="infiniband", device="dev:mlx5_0")
    door("ib-link", "ignore", clears=True, role="context", **about_port)
    assert len(door.wishes) == 1
    door("nccl-warn", "replace", **about_port)
    door("nccl-warn", "ignore", clears=True, role="context", **about_port)
    assert door.triage.failed(("n1", 1), door.now) == []


@pytest.mark.parametrize("device", ["peer:" + "9" * 5000, "peer:\u00b2", "peer:\u0669", ",".join(f"peer:{i}.x" for i in range(10_000))])
def test_no_name_of_a_device_is_too_odd(device):
    finding = Finding(seq=1, kind="nccl-error", device=device, ranks=(0,), rank=0)
    assert about(finding, "n0", addresses(fleet()), PLACES) == ("n0", finding)
    crew = Crew("n0.", 1.0)
    crew.places[0] = Seat(0, 0)
    for form in ("gpu", "pid", "rank"):
        assert not crew.on(device.replace("peer", form), {})


def test_who_will_sit_on_a_device_is_not_known_before_anybody_does():
    crew = Crew("n0.", 1.0)
    assert crew.on("gpu:3", {"pci:0000:1a:00": 3}) is None
    crew.places[0] = Seat(0, 0)
    assert crew.on("gpu:3", {"pci:0000:1a:00": 3}) == ()


def test_a_report_has_room_for_whatever_probes_give():
    found = Findings()
    word = "\U0001f525" * 100_000
    for i in range(300):
        wide = Finding(seq=0, kind=word, code=f"{i}{word}", device=word, worker=word, layer=word, text=word[:4096], probe=word)
        found.take([wide], 1.0, 1)
    assert len(encode(Report(run="r", node="n0", boot=1, seq=1, findings=found.aged(2.0)))) < FRAME_BYTES_MAX


def test_what_two_workers_wrote_is_two_findings():
    found = Findings()
    line = Finding(seq=0, kind="cuda-error", code="214", probe="worker-log", class_="gpu-reset")
    found.take([replace(line, rank=r, ranks=(r,), worker=f"w{r}") for r in (0, 1, 1)], 1.0, 1)
    assert [(f.rank, f.count) for f in found.unheard] == [(0, 1), (1, 2)]
