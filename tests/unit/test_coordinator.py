"""The coordinator's machine, event by event. Whole evenings are played in tests/sim and tests/golden."""

from __future__ import annotations

import tomllib

import msgspec
import pytest

from resilient.core import lines
from resilient.core.coordinator import Coordinator
from resilient.core.machine import Announce, Assign, CoordinatorSettings, Finish, NodeLost, NodeUp, StatusDue, Stop, Tick
from resilient.core.messages import (
    NONE,
    Audit,
    Chair,
    Compared,
    Difference,
    Finding,
    Holding,
    Pace,
    Persisted,
    Record,
    Report,
    Standby,
    Sum,
    Tally,
)
from resilient.core.placement import Place
from resilient.core.round import Round
from resilient.core.seating import Seating
from resilient.rulebook import lay, shipped


class House:
    """A coordinator, and reports that are easy to write."""

    def __init__(self, **settings):
        self.now, self.done, self.seq = 100.0, [], 0
        self.coordinator = Coordinator(CoordinatorSettings(run="r", leader="n0", **settings))

    def __call__(self, event, after=0.0):
        self.now += after
        done = self.coordinator.step(event, self.now)
        self.done += done
        return done

    def report(self, node="n0", after=0.0, **facts):
        self.seq += 1
        first = {"store": "s:1", "available": ()} if node == "n0" else {}
        facts = {
            "slots": 2,
            "host": node,
            "data_port": 7,
            "managed": True,
            "round": self.coordinator.round.number,
            "boot": 1,
            **first,
            **facts,
        }
        return self(Report(run="r", node=node, seq=self.seq, **facts), after)

    def at(self, node="n0"):
        """The newest assignment that was sent there."""
        return next(a.assignment for a in reversed(self.done) if isinstance(a, Assign) and a.node == node)

    def told(self, kind):
        return [a.line for a in self.done if isinstance(a, Announce) and isinstance(a.line, kind)]

    @property
    def finish(self):
        return next((a for a in self.done if isinstance(a, Finish)), None)


def chairs(round=1, step=5, ranks=(0, 1), dead=(), phase="running", state="active", committed=1.0):
    made = []
    for i, rank in enumerate(ranks):
        record = Record(round=round, step=step, phase=phase, committed_s=committed, regrouped_s=1.0, restored_s=1.0)
        facts = {"replicated": True, "layout": "net", "own_step": step, "own_steps": (step,)}
        made.append(
            Chair(
                rank=rank, local_rank=i, state="dead" if rank in dead else state, worker=f"w{rank}", pid=10 + rank, record=record, **facts
            )
        )
    return tuple(made)


@pytest.fixture
def house():
    h = House()
    h.report()
    h.report(chairs=chairs(), fenced=0)
    assert h.coordinator.state == "running"
    return h


def kill(house, rank=1, **facts):
    fault = Finding(
        seq=facts.pop("seq", 1),
        kind="exit",
        rank=rank,
        worker=f"w{rank}",
        pid=10 + rank,
        round=house.coordinator.round.number,
        exit_code=-9,
    )
    number = house.coordinator.round.number
    return house.report(chairs=chairs(dead=(rank,), round=number), fenced=number, findings=(fault,), **facts)


def test_the_run_starts_when_store_and_checkpoints_are_known():
    house = House()
    house.report(store="", available=None)
    assert house.coordinator.stage == "gathering"
    house.report(available=None)
    assert house.coordinator.stage == "gathering"
    house.report()
    sheet = house.at()
    assert (sheet.round, sheet.world_size, sheet.store, [(s.rank, s.local_rank, s.fresh) for s in sheet.seats]) == (
        1,
        2,
        "s:1",
        [(0, 0, True), (1, 1, True)],
    )
    assert house.told(lines.RunStarted)[0].world_size == 2


def test_what_a_predecessor_left_is_gone_on_with_in_a_later_round():
    """Of a node that was lost before the end, nothing is taken: it may hold a step of a future that was given up."""
    held = tuple(Holding(rank=rank, snapshots=(7, 8), native=True) for rank in range(2))
    for stale, step in ((False, 8), (True, NONE)):
        first = Report(run="r", node="n0", boot=1, seq=1, slots=1, store="s:1", available=(), past=5, holdings=held[:1])
        second = Report(run="r", node="n1", boot=1, seq=1, slots=1, past=4 if stale else 5, holdings=held[1:])
        coordinator = Coordinator(CoordinatorSettings(run="r", leader="n0", nodes_min=2, nodes_max=2))
        sheets = [a.assignment for report in (first, second) for a in coordinator.step(report, 1.0) if isinstance(a, Assign)]
        newest = max(sheets, key=lambda sheet: sheet.round)
        assert (newest.round, newest.fence, newest.restart, newest.plan.step) == (6, 5, 0, step)


def test_min_and_max_nodes_and_the_last_call():
    house = House(nodes_min=2, nodes_max=3, last_call_s=10.0)
    house.report("n1")
    house.report("n0")
    assert house.coordinator.stage == "gathering"
    assert house.coordinator.deadline() <= house.now + 10.0
    for _ in range(5):
        house.report("n0", 2.0)
        house.report("n1")
    assert house.coordinator.stage == "seated"
    assert [s.rank for s in house.at("n0").seats] == [0, 1], "the leader came second, but leads"
    house.report("n2")
    assert (house.at("n2").seats, house.at("n2").round) == ((), 1), "a spare node waits"


def test_who_does_not_come_is_counted():
    house = House(nodes_min=2, nodes_max=2, join_timeout_s=5.0)
    house.report("n0")
    house.report("n0", 5.0)
    assert "1 of 2 nodes came" in house.coordinator.message
    assert house.at().state == "failed"


def test_a_dead_rank_makes_one_round(house):
    kill(house)
    assert (house.at().fence, house.at().round, house.at().incident, house.at().seen) == (1, 1, 1, 1)
    house(Tick(), 0.006)
    sheet = house.at()
    assert (sheet.round, sheet.put_down, sheet.plan.tier, sheet.plan.receivers) == (2, ("w1",), "live", (1,))
    house.report(chairs=chairs(round=2), after=0.3, acted_s=0.5)
    (line,) = house.told(lines.IncidentClosed)
    assert (line.cause, line.rank, line.pid, line.restored_from, line.steps_lost) == ("exit", 1, 11, "live", 0)
    assert (line.decide, line.regroup) == (0.006, 0.5)
    assert house.coordinator.state == "running"


def test_who_was_put_down_never_comes_back_even_if_its_node_has_not_heard_it():
    house = House()
    house.report()
    setting_up = {"phase": "setup", "state": "joined", "committed": 0.0}
    house.report(chairs=chairs(round=0, dead=(1,), **setting_up), fenced=1)
    house(Tick(), 0.3)
    assert (house.coordinator.round.number, house.at().put_down) == (2, ("w1",)), "w0 waits for its first seat and may stay"
    house = House()
    house.report()
    house.report(chairs=chairs(round=1, dead=(1,), **setting_up), fenced=1)
    house(Tick(), 0.3)
    assert house.at().put_down == ("w1",), "w0 goes on with its set-up"
    house.report(chairs=chairs(round=0, **setting_up), fenced=2, round=1)
    house(Tick(), 0.3)
    assert (house.coordinator.round.number, house.at().put_down) == (3, ("w1",)), "the old one, still"


def test_deaths_that_are_close_together_make_one_round(house):
    kill(house)
    faults = tuple(Finding(seq=n, kind="exit", rank=n - 1, worker=f"w{n - 1}", round=1, exit_code=-9) for n in (1, 2))
    house.report(chairs=chairs(dead=(0, 1)), fenced=1, findings=faults, after=0.002)
    house(Tick(), 0.004)
    assert house.coordinator.round.number == 2
    assert set(house.at().put_down) == {"w0", "w1"}


def test_a_lone_suspicion_waits_for_the_death_report(house):
    suspect = Finding(seq=1, kind="suspect", rank=0, worker="w0", round=1)
    house.report(chairs=chairs(), fenced=1, findings=(suspect,))
    house(Tick(), 0.1)
    assert house.coordinator.round.number == 1
    house(Tick(), 0.11)
    assert (house.coordinator.round.number, house.at().put_down, house.at().plan.receivers) == (2, (), ())


def test_every_living_node_fences_before_a_round_is_seated():
    house = House(nodes_min=2, nodes_max=2)
    house.report("n0")
    house.report("n1")
    house.report("n0", chairs=chairs())
    house.report("n1", chairs=chairs(ranks=(2, 3)))
    kill(house)
    house(Tick(), 3.0)
    assert house.coordinator.round.number == 1
    house.report("n1", chairs=chairs(ranks=(2, 3)), fenced=1)
    assert house.coordinator.round.number == 2


def test_an_assignment_that_was_not_heard_is_sent_again(house):
    kill(house)
    count = len(house.done)
    house.report(chairs=chairs(dead=(1,)), fenced=1, after=0.003, assigned=1)
    assert not [a for a in house.done[count:] if isinstance(a, Assign)], "it may be under way"
    house(Tick(), 0.003)
    sheet = house.at()
    again = house.report(chairs=chairs(dead=(1,)), fenced=1, after=0.3, assigned=1)
    assert [a.assignment for a in again if isinstance(a, Assign)] == [sheet]
    quiet = house.report(chairs=chairs(round=2), after=0.5, assigned=sheet.seq)
    assert not [a for a in quiet if isinstance(a, Assign)]
    assert [a for a in house.report(chairs=chairs(round=2), after=3.0, assigned=sheet.seq) if isinstance(a, Assign)], "a sign of life"


def test_an_incident_at_the_very_end_is_closed(house):
    """One report says that the newcomer has come, and that all are through."""
    kill(house)
    house(Tick(), 0.006)
    house.report(chairs=chairs(round=2, state="finished", phase="done"), after=0.5)
    (line,) = house.told(lines.IncidentClosed)
    assert (line.rank, line.steps_lost) == (1, 0)
    assert house.coordinator.state == "finished"


def test_old_and_foreign_reports_are_ignored(house):
    before = house.coordinator.nodes["n0"].report
    house(Report(run="r", node="n0", boot=1, seq=1, fenced=9))
    house(Report(run="another", node="n9", boot=1, seq=1))
    assert house.coordinator.nodes["n0"].report is before
    assert "n9" not in house.coordinator.nodes


def test_a_clock_that_goes_back_keeps_no_agent_out(house):
    """An agent that is started again may have any number; the one before it, which may still be about, is not heard any more."""
    for boot in (1_000, 7, 500):
        house.report(boot=boot, after=3.0)
        assert house.coordinator.nodes["n0"].report.boot == boot
    for boot in (1_000, 7, 1_000):
        house.report(boot=boot, after=3.0)
        assert house.coordinator.nodes["n0"].report.boot == 500


def test_an_agent_whose_first_words_overtook_the_last_of_the_one_before_is_heard(house):
    for boot in (8, 7, 8):  # 7 is gone: this was on its way
        house.report(boot=boot, after=0.1)
        assert house.coordinator.nodes["n0"].report.boot == boot
    house.report(boot=8, after=3.0)
    house.report(boot=9)
    house.report(boot=8)
    assert house.coordinator.nodes["n0"].report.boot == 9, "8 was heard for long"


def two_nodes():
    house = House(nodes_min=2, nodes_max=2)
    house.report("n0")
    house.report("n1")
    house.report("n0", chairs=chairs(), spares=2)
    house.report("n1", chairs=chairs(ranks=(2, 3)))
    return house


def test_a_reset_connection_may_come_back():
    house = two_nodes()
    house(NodeLost(node="n1"))
    assert house.coordinator.deadline() <= house.now + 1.0
    house(NodeUp(node="n1"), 0.5)
    house(Tick(), 2.0)
    assert house.coordinator.stage == "seated"


def test_a_node_that_does_not_come_back_is_lost():
    house = two_nodes()
    house(NodeLost(node="n1"))
    house(Tick(), 1.0)
    assert [f.kind for f in house.told(lines.FindingLine)] == ["node_lost"]
    house.report("n0", chairs=chairs(), fenced=1, spares=2)
    house(Tick(), 0.3)
    assert [s.rank for s in house.at("n0").seats] == [0, 1, 2, 3]
    assert "rank 2 to n0" in " ".join(house.told(lines.RoundStarted)[-1].why)


def test_a_silent_node_is_lost_after_its_lease():
    house = two_nodes()
    for _ in range(4):
        house.report("n0", chairs=chairs(), spares=2, after=2.5)
    assert house.told(lines.FindingLine)[0].kind == "node_lost"


def test_nodes_are_told_with_whom_they_keep_parity():
    round_ = Round(copies=1, parity=2)
    places = {rank: Place(node=f"n{rank // 2}", local_rank=rank % 2, why="") for rank in range(10)}
    reports = {
        f"n{i}": Report(run="r", node=f"n{i}", boot=1, seq=1, host=f"n{i}", data_port=7, failure_domain="ab"[i % 2]) for i in range(5)
    }
    round_.seat(Seating(places=places), reports)
    groups = {round_.sheet("r", node).group for node in reports}
    assert sorted(len(group) for group in groups) == [2, 3]
    assert {member.vault: member.ranks for group in groups for member in group} == {f"n{i}:7": (2 * i, 2 * i + 1) for i in range(5)}
    assert all(len(round_.sheet("r", node).peers) == 1 for node in reports), "own state goes whole"
    assert not Round(copies=1).sheet("r", "n0").group


def test_a_chair_without_room_waits_for_a_node_and_not_for_ever():
    house = House(nodes_min=2, nodes_max=2, join_timeout_s=20.0)
    house.report("n0")
    house.report("n1")
    house.report("n0", chairs=chairs())
    house.report("n1", chairs=chairs(ranks=(2, 3)))
    house(NodeLost(node="n1"))
    house(Tick(), 1.0)
    house.report("n0", chairs=chairs(), fenced=1)
    house(Tick(), 0.3)
    assert house.told(lines.FindingLine)[-1].kind == "no_room"
    for _ in range(21):
        house.report("n0", chairs=chairs(), fenced=1, after=1.0)
    assert "no node had room for ranks 2, 3" in house.coordinator.message


def test_rounds_without_progress_wait_longer_and_end(house):
    seen = []
    for n in range(1, 12):
        began = house.now
        kill(house, seq=n)
        while house.coordinator.stage == "broken":
            house(Tick(), 0.05)
        seen.append(house.now - began)
        if house.coordinator.stage != "seated":
            break
    assert seen[0] < 0.2
    assert 1.0 <= seen[3] < seen[5] < seen[7]
    assert len(seen) == 11
    assert "rounds in a row" in house.coordinator.message


def test_a_users_error_ends_the_run_with_its_traceback(house):
    for n in (1, 2):
        number = house.coordinator.round.number
        error = Finding(
            seq=n, kind="exception", rank=1, worker=f"w{n}", round=number, step=5, fingerprint="E", text="Traceback\nValueError: bad"
        )
        house.report(chairs=chairs(dead=(1,), round=number), fenced=number, findings=(error,))
        house(Tick(), 0.01)
    assert (house.at().state, house.at().exit_code) == ("failed", 1)
    assert "ValueError: bad" in house.at().message
    assert house.told(lines.RunFinished)[0].exit_code == 1


def test_the_end_waits_until_all_have_heard_it_but_not_for_ever():
    house = two_nodes()
    over = {"phase": "done", "state": "finished"}
    house.report("n0", chairs=chairs(**over))
    house.report("n1", chairs=chairs(ranks=(2, 3), **over))
    assert house.at("n1").state == "finished"
    house.report("n0", chairs=chairs(**over), assigned=house.at("n0").seq)
    assert house.finish is None
    house.report("n1", chairs=chairs(ranks=(2, 3), **over), assigned=house.at("n1").seq)
    assert house.finish == Finish(exit_code=0)
    assert house.coordinator.deadline() is None
    house = two_nodes()
    house(Stop(signal=15))
    house(Tick(), 5.0)
    assert house.finish.exit_code == 1
    assert "signal 15" in house.finish.message


def test_a_node_that_was_told_to_stop_ends_the_run():
    house = two_nodes()
    house.report("n1", chairs=chairs(ranks=(2, 3)), leaving=True)
    assert "n1 was told to stop" in house.coordinator.message


def test_before_that_what_all_ranks_have_sealed_is_written_and_committed():
    house = House(nodes_min=2, nodes_max=2, grace_s=20.0, checkpoints=True)
    for node in ("n0", "n1"):
        house.report(node)
    house.report("n0", chairs=chairs())
    house.report("n1", chairs=chairs(ranks=(2, 3)))
    house.report("n1", chairs=chairs(ranks=(2, 3)), leaving=True)
    assert (house.at("n0").state, house.at("n0").wait, house.at("n0").rescue) == ("failed", True, -1)
    assert house.told(lines.RunFinished) == []
    gone = {
        node: tuple(msgspec.structs.replace(c, state="dead", snapshots=held) for c in chairs(ranks=ranks))
        for node, ranks, held in (("n0", (0, 1), (6, 7)), ("n1", (2, 3), (5, 6)))
    }
    house.report("n0", chairs=gone["n0"])
    assert house.at("n0").rescue == -1, "the others may yet seal something"
    house.report("n1", chairs=gone["n1"], leaving=True)
    assert {house.at(node).rescue for node in ("n0", "n1")} == {6}
    files = [Persisted(rank=r, step=6, num_bytes=1, digest="") for r in range(4)]
    house.report("n0", chairs=gone["n0"], persisted=tuple(files[:2]))
    house.report("n1", chairs=gone["n1"], persisted=tuple(files[2:]), leaving=True)
    assert (house.at("n0").commit, house.at("n0").wait) == (6, True)
    house.report("n0", chairs=gone["n0"], committed=6)
    assert not house.at("n1").wait
    (end,) = house.told(lines.RunFinished)
    assert end.message.startswith("node n1 was told to stop; step 6 was brought from memory")


def test_a_warning_names_a_step_for_everybody(house):
    house = House(checkpoints=True)
    house.report()
    for step in range(1, 30):
        pace = Pace(rank=0, step=step, at_s=step / 4)
        house.report(after=0.25, chairs=chairs(step=step), pace=pace)
    assert house.at().checkpoint == -1
    house.report(chairs=chairs(step=29), pace=pace, findings=(Finding(seq=1, kind="warning", text="SIGUSR1"),))
    assert house.at().checkpoint == 34, "a second from here"
    assert house.coordinator.stage == "seated"
    assert house.coordinator.status().checkpoint.next == 34


def test_checkpoints_are_committed_by_the_leader_when_all_ranks_files_are_there(house):
    files = tuple(Persisted(rank=r, step=10, num_bytes=1, digest="") for r in (0, 1))
    house.report(chairs=chairs(), persisted=files[:1])
    assert house.at().commit == -1
    house.report(chairs=chairs(), persisted=files)
    assert (house.at().commit, house.at().manifest) == (10, files)
    house.report(chairs=chairs(), persisted=files, committed=10)
    assert house.told(lines.CheckpointCommitted) == [lines.CheckpointCommitted(step=10)]


def test_the_end_waits_for_the_last_marker_but_not_for_ever(house):
    files = tuple(Persisted(rank=r, step=10, num_bytes=1, digest="") for r in (0, 1))
    over = chairs(phase="done", state="finished")
    house.report(chairs=over, persisted=files)
    assert house.coordinator.stage == "seated"
    house.report(chairs=over, persisted=files, after=59.0)
    assert house.coordinator.deadline() <= house.now + 1.0
    house.report(chairs=over, persisted=files, after=1.0)
    assert (house.coordinator.stage, house.at().state) == ("ending", "finished")


def test_status_says_who_sits_where(house):
    house.report(chairs=chairs(), standbys=(Standby(worker="w9", pid=99, shadow=0, state="parked"),))
    status = msgspec.json.decode(msgspec.json.encode(house.coordinator.status()))
    assert status["ranks"][1] == {"rank": 1, "node": "n0", "local_rank": 1, "pid": 11, "step": 5, "waits": None, "slower": None}
    assert status["standbys"] == [{"node": "n0", "pid": 99, "shadow": 0, "ready": True}]
    assert (status["state"], status["round"], status["world_size"]) == ("running", 1, 2)
    assert StatusDue() in house(Tick(), 1.0)


def test_workers_and_standbys_are_announced_once(house):
    standby = Standby(worker="w9", pid=99, shadow=0)
    for state in ("starting", "starting", "parked", "parked"):
        house.report(chairs=chairs(), standbys=(msgspec.structs.replace(standby, state=state),))
    assert [(w.worker, w.role) for w in house.told(lines.WorkerStarted)] == [("w0", "rank"), ("w1", "rank"), ("w9", "standby")]
    assert len(house.told(lines.StandbyReady)) == 1


def stalled(rank, seq):
    return Finding(seq=seq, kind="stalled", rank=rank, worker=f"w{rank}", round=1)


def test_the_rank_that_did_not_arrive_is_replaced(house):
    inside = {"entered": 6, "completed": 5}
    both = chairs()
    both = (msgspec.structs.replace(both[0], record=msgspec.structs.replace(both[0].record, **inside)), both[1])
    house.report(chairs=both, findings=(stalled(0, 1),))
    assert house.coordinator.stage == "seated", "a victim: its culprit's report may be on its way"
    house.report(chairs=both, findings=(stalled(0, 1), stalled(1, 2)))
    assert (house.at().fence, house.at().evidence) == (1, 1)
    house.report(chairs=both, fenced=1)
    house(Tick(), 0.01)
    assert house.at().put_down == ("w1",)


def test_when_all_wait_inside_the_round_is_formed_again(house):
    inside = tuple(msgspec.structs.replace(c, record=msgspec.structs.replace(c.record, entered=6, completed=5)) for c in chairs())
    house.report(chairs=inside, findings=(stalled(0, 1), stalled(1, 2)))
    house.report(chairs=inside, after=4.9)
    assert house.coordinator.stage == "seated"
    house.report(chairs=inside, after=0.2)
    assert house.at().fence == 1
    house.report(chairs=inside, fenced=1, after=0.3)
    assert (house.coordinator.round.number, house.at().put_down) == (2, ())


def test_in_shadow_mode_a_hang_is_told_and_nobody_is_touched():
    house = House(hang="report")
    house.report()
    inside = {"entered": 6, "completed": 5}
    both = chairs()
    both = (msgspec.structs.replace(both[0], record=msgspec.structs.replace(both[0].record, **inside)), both[1])
    house.report(chairs=both, findings=(stalled(0, 1), stalled(1, 2)))
    stopped = Finding(seq=3, kind="stopped", rank=1, worker="w1", round=1)
    house.report(chairs=both, findings=(stalled(0, 1), stalled(1, 2), stopped))
    assert {line.verdict for line in house.told(lines.VerdictLine)} == {"watch"}
    assert [line.rank for line in house.told(lines.VerdictLine) if "--hang report" in line.why] == [1, 1]
    assert (house.coordinator.stage, house.at().fence, house.at().evidence) == ("seated", 0, 1)
    assert not house.coordinator._court.condemned


def test_ranks_that_wait_for_each_other_are_given_one_more_try(house):
    crossed = []
    for chair in chairs():
        groups = tuple(Tally(name, 2 + (name == 7 + chair.rank), 2) for name in (7, 8))
        crossed.append(msgspec.structs.replace(chair, record=msgspec.structs.replace(chair.record, entered=5, completed=4, groups=groups)))
    house.report(chairs=crossed, findings=(stalled(0, 1), stalled(1, 2)))
    told = [line for line in house.told(lines.FindingLine) if line.kind == "collective-order"]
    assert [line.rank for line in told] == [0, 1]
    house.report(chairs=crossed, fenced=1)
    house(Tick(), 0.3)
    assert (house.coordinator.round.number, house.at().put_down) == (2, ())
    again = [msgspec.structs.replace(c, record=msgspec.structs.replace(c.record, round=2)) for c in crossed]
    house.report(chairs=again, round=2, findings=(stalled(0, 3), stalled(1, 4)))
    house(Tick(), 6.0)
    assert house.at().state == "failed"
    assert "different order" in house.at().message


def test_replicas_that_differ_are_looked_into_by_the_leader_and_told():
    house = House(nodes_min=2, nodes_max=2)
    house.report("n0", slots=1)
    house.report("n1", slots=1)

    def audit(node, rank, digest):
        return Audit(step=5, round=1, sums=(Sum(twins=(0, 2, 1), digest=digest, ranks=(rank,)),))

    house.report("n0", chairs=chairs(ranks=(0,)), audit=audit("n0", 0, "a"))
    house.report("n1", chairs=chairs(ranks=(1,)), audit=audit("n1", 1, "b"))
    wish = house.at("n0").compare
    assert [(sheet.vault, sheet.digest, sheet.ranks) for sheet in wish.sheets] == [("n0:7", "a", (0,)), ("n1:7", "b", (1,))]
    assert house.at("n1").compare is None
    found = Compared(step=5, round=1, differences=(Difference(ranks=(0, 1), twins=2, text="step 5: w"),))
    house.report("n1", chairs=chairs(ranks=(1,)), compared=found)
    assert not house.told(lines.FindingLine), "only the leader was asked"
    house.report("n0", chairs=chairs(ranks=(0,)), compared=found)
    assert [(line.kind, line.node, line.rank, line.step, line.text) for line in house.told(lines.FindingLine)] == [
        ("replicas_differ", "n0", 0, 5, "step 5: w"),
        ("replicas_differ", "n1", 1, 5, "step 5: w"),
    ]
    assert {line.verdict for line in house.told(lines.VerdictLine)} == {"watch"}
    assert house.at("n0").compare is None
    assert house.coordinator.stage == "seated", "the run goes on"
    assert house.coordinator.status().replicas.differ == (0, 1)


def saw(seq=1, kind="xid", class_="replace", **facts):
    return Finding(seq=seq, kind=kind, class_=class_, probe=facts.pop("probe", "kernel-log"), **facts)


@pytest.fixture
def sick():
    """Two nodes with two ranks each, and a third with room; one GPU of n1 is lost."""
    h = House(nodes_min=2, nodes_max=2, rules=shipped())
    h.report()
    h.report("n1")
    h.report(chairs=chairs())
    h.report("n1", chairs=chairs(ranks=(2, 3)))
    assert h.coordinator.state == "running"
    return h


def test_a_lost_gpu_breaks_the_round_only_where_there_is_room(sick):
    sick.report("n1", chairs=chairs(ranks=(2, 3)), findings=(saw(code="79", device="gpu:0", ranks=(2,), rank=2),))
    assert [line.node for line in sick.told(lines.NodeCordoned)] == ["n1"]
    assert sick.coordinator.stage == "seated"
    assert sick.coordinator.status().cordoned == ("n1",)
    sick.report("n2", round=0)
    assert sick.coordinator.stage == "broken"
    for node, ranks in (("n0", (0, 1)), ("n1", (2, 3))):
        sick.report(node, chairs=chairs(ranks=ranks), fenced=1)
    sick(Tick(), after=1.0)
    assert [s.rank for s in sick.at("n2").seats] == [2, 3]
    assert [s.rank for s in sick.at("n1").seats] == []
    assert set(sick.at("n1").put_down) == {"w2", "w3"}
    assert sick.told(lines.RoundStarted)[-1].reason == "xid of rank 2"


def test_moved_ranks_fetch_what_their_old_node_holds(sick):
    sharded = tuple(msgspec.structs.replace(c, replicated=False, snapshots=(4, 5)) for c in chairs(ranks=(2, 3)))
    others = tuple(msgspec.structs.replace(c, replicated=False, snapshots=(4, 5)) for c in chairs())
    sick.report("n2", round=0)
    sick.report("n1", chairs=sharded, findings=(saw(code="79", device="gpu:0", ranks=(2,), rank=2),))
    sick.report("n0", chairs=others, fenced=1)
    sick.report("n1", chairs=sharded, fenced=1)
    sick(Tick(), after=1.0)
    assert [(f.rank, f.step, f.tier, f.source) for f in sick.at("n2").fetch] == [(2, 5, "peer", "n1:7"), (3, 5, "peer", "n1:7")]
    assert (sick.at("n2").plan.step, sick.at("n2").plan.tier) == (5, "peer")


def test_who_holds_the_only_copy_stays(sick):
    bare = [msgspec.structs.replace(c, replicated=False, own_steps=(), own_step=NONE) for c in (*chairs(), *chairs(ranks=(2, 3)))]
    sick.report("n2", round=0)
    sick.report("n1", chairs=tuple(bare[2:]), findings=(saw(code="79", device="gpu:0", ranks=(2,), rank=2),))
    sick.report("n0", chairs=tuple(bare[:2]), fenced=1)
    sick.report("n1", chairs=tuple(bare[2:]), fenced=1)
    sick(Tick(), after=1.0)
    assert [s.rank for s in sick.at("n1").seats] == [2, 3]
    assert sick.at("n1").put_down == ()
    assert sick.at("n1").plan.step == 5


def test_a_rule_may_have_a_worker_renewed():
    rules = lay(shipped(), tomllib.loads("[rule.xid-94]\nverdict = 'replace'"), "mine.toml")
    h = House(rules=rules)
    h.report()
    h.report(chairs=chairs())
    h.report(chairs=chairs(), findings=(saw(code="94", class_="app-restart", device="gpu:1", ranks=(1,), rank=1),))
    assert h.coordinator.stage == "broken"
    h.report(chairs=chairs(), fenced=1)
    h(Tick(), after=1.0)
    assert h.at().put_down == ("w1",)


def test_a_run_that_waits_for_admission_says_who_failed_what():
    h = House(nodes_min=2, nodes_max=2, join_timeout_s=60.0)
    h.report()
    for _ in range(12):
        assert h.coordinator.stage == "gathering"
        h.report("n1", after=5.0, admitted=False, admission="disk: 3 MB/s, 200 expected")
        h.report()
    h(Tick(), after=1.0)
    assert "1 of 2 nodes came; n1 is not admitted: disk: 3 MB/s, 200 expected" in h.coordinator.message


def test_an_admitted_node_is_counted_at_once():
    h = House(nodes_min=2, nodes_max=2)
    h.report()
    h.report("n1", admitted=False)
    h.report("n1", admitted=True)
    assert h.coordinator.stage == "seated"


def test_findings_of_probes_cost_no_incident_number_and_are_told_with_their_fields(sick):
    sick.report(
        "n1",
        chairs=chairs(ranks=(2, 3)),
        findings=(saw(kind="nvlink-replay", class_="app-restart", device="gpu:0", layer="nvlink", code="3", count=7),),
    )
    line = sick.told(lines.FindingLine)[-1]
    assert (line.probe, line.class_, line.layer, line.code, line.device, line.count) == (
        "kernel-log",
        "app-restart",
        "nvlink",
        "3",
        "gpu:0",
        7,
    )
    assert sick.told(lines.VerdictLine)[-1].verdict == "watch"
    assert sick.coordinator.incident is None
