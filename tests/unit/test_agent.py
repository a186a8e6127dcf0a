"""The agent's machine, event by event. Whole evenings are played in tests/sim and tests/golden."""

from __future__ import annotations

import msgspec
import pytest

from resilient.core import machine as m
from resilient.core.agent import Agent
from resilient.core.messages import (
    Assignment,
    Fenced,
    Fetch,
    Finding,
    Join,
    Layout,
    Leave,
    Marked,
    Plan,
    Raised,
    Recall,
    Record,
    Recorded,
    Seat,
    Seated,
    Segments,
    Suspect,
    Unrecorded,
    Unrepeatable,
)


class Stage:
    """An agent whose host obeys at once: forks, and answers every fence with a look."""

    def __init__(self, **settings):
        self.now, self.done, self.pages, self.os, self.seals = 10.0, [], {}, {}, {}
        self.agent = Agent(m.AgentSettings(run="r", node="n0", **{"slots": 2, **settings}))
        self.pid = 100
        self(m.Tick())
        self(m.ZygoteUp())

    def __call__(self, event, after=0.0):
        """Step an event; returns the actions of this and of what followed from it at once."""
        self.now += after
        queue, done = [event], []
        while queue:
            actions = self.agent.step(queue.pop(0), self.now)
            done += actions
            for action in actions:
                if isinstance(action, m.Fork):
                    self.pid += 1
                    self.pages[action.worker] = Record()
                    queue.append(m.Forked(worker=action.worker, pid=self.pid))
                elif isinstance(action, m.Forget):
                    self.pages.pop(action.worker, None)
                elif isinstance(action, m.Fence):
                    queue.append(self.looked(action.round))
        self.done += done
        return done

    def looked(self, fence=0):
        looks = {w: m.Look(record=r, parked=w in self.os.get("parked", ()), os_state=self.os.get(w, "S")) for w, r in self.pages.items()}
        return m.Looked(workers=looks, seals=self.seals, fence=fence)

    def look(self, after=0.0):
        return self(self.looked(), after)

    def assign(self, seq, **facts):
        fresh = facts.pop("fresh", True)
        seats = tuple(Seat(rank=r, local_rank=r, fresh=fresh) for r in facts.pop("ranks", (0, 1)))
        facts = {"round": 1, "world_size": 2, "nodes": 1, "store": "s:1", "seats": seats, **facts}
        return self(m.Assigned(assignment=Assignment(run="r", node="n0", seq=seq, **facts)))

    def running(self, round=1, **more):
        """All join, and are past their first step."""
        for worker in list(self.pages):
            if worker not in self.os.get("parked", ()):
                self(m.Said(worker=worker, message=Join(worker=worker, pid=1, token="")))
                self.pages[worker] = Record(round=round, step=5, phase="running", committed_s=1.0, **more)
        return self.look()

    @property
    def report(self):
        return next(a.report for a in reversed(self.done) if isinstance(a, m.SendReport))


def of(actions, kind):
    return [a for a in actions if isinstance(a, kind)]


def told(actions, kind):
    return {a.worker: a.message for a in of(actions, m.Tell) if isinstance(a.message, kind)}


@pytest.fixture
def stage():
    s = Stage()
    s.assign(1)
    s.running()
    return s


def test_nothing_is_forked_before_there_is_a_zygote():
    agent = Agent(m.AgentSettings(run="r", node="n0", slots=1, hosts_store=True))
    first = agent.step(m.Tick(), 1.0)
    assert of(first, m.StartStore)
    assert of(first, m.SendReport)
    seats = (Seat(rank=0, local_rank=0, fresh=True),)
    assigned = m.Assigned(assignment=Assignment(run="r", node="n0", seq=1, round=1, world_size=1, seats=seats, store="s:1"))
    assert not of(agent.step(assigned, 1.1), m.Fork)
    (fork,) = of(agent.step(m.ZygoteUp(), 1.2), m.Fork)
    assert (fork.worker, fork.role, fork.rank, fork.store, fork.world_size) == ("n0.1", "rank", 0, "s:1", 1)


def test_a_seat_is_told_when_the_worker_has_joined():
    stage = Stage()
    stage.assign(1)
    assert not told(stage.done, Seated)
    seated = told(stage(m.Said(worker="n0.1", message=Join(worker="n0.1", pid=1, token=""))), Seated)
    assert (seated["n0.1"].rank, seated["n0.1"].round, seated["n0.1"].local_world_size) == (0, 1, 2)
    assert not told(stage.look(), Seated), "once"


def test_a_death_fences_first_and_reports_what_was_read_after(stage):
    stage.pages["n0.2"] = Record(round=1, step=6, phase="voted")
    done = stage(m.Exited(worker="n0.1", exit_code=-9))
    kinds = [type(a) for a in done]
    assert kinds.index(m.Fence) < kinds.index(m.Tell) < kinds.index(m.SendReport)
    assert set(told(done, Fenced)) == {"n0.2"}
    assert len(of(done, m.SendReport)) == 1
    report = stage.report
    assert (report.fenced, [c.state for c in report.chairs]) == (1, ["dead", "active"])
    assert report.chairs[1].record.phase == "voted"
    assert [(f.kind, f.rank, f.exit_code) for f in report.findings] == [("exit", 0, -9)]


def test_findings_are_repeated_until_they_are_heard(stage):
    stage(m.Exited(worker="n0.1", exit_code=-9))
    stage(m.Tick(), 1.0)
    assert stage.report.findings[0].age_s == pytest.approx(1.0)
    stage.assign(2, fence=1, seen=1)
    assert not stage.report.findings


def test_only_those_who_are_put_down_lose_their_chair(stage):
    stage(m.Exited(worker="n0.1", exit_code=-9))
    done = stage.assign(2, fence=1, round=2, fresh=False, put_down=("n0.1",))
    (fork,) = of(done, m.Fork)
    assert (fork.role, fork.rank) == ("standby", 0)
    assert of(done, m.Forget) == [m.Forget(worker="n0.1")]
    assert set(told(done, Seated)) == {"n0.2"}
    assert not of(done, m.Kill)


def test_a_death_that_the_coordinator_did_not_know_makes_a_newer_round(stage):
    stage(m.Exited(worker="n0.1", exit_code=-9))
    stage(m.Exited(worker="n0.2", exit_code=-9))
    done = stage.assign(2, fence=1, round=2, fresh=False, put_down=("n0.1",))
    assert of(done, m.Fence) == [m.Fence(round=2)]
    assert not any(f.rank == 1 for f in of(done, m.Fork)), "never a quiet replacement"
    assert (stage.report.round, stage.report.fenced) == (2, 2)


def test_the_standby_that_shadows_the_chair_takes_it():
    stage = Stage(standbys=1)
    stage.assign(1)
    stage.running()
    assert [(s.worker, s.shadow) for s in stage.report.standbys] == [("n0.3", 0)]
    stage.os["parked"] = ("n0.3",)
    stage(m.Said(worker="n0.3", message=Join(worker="n0.3", pid=1, token="")))
    stage.look()
    assert stage.report.standbys[0].state == "parked"
    stage(m.Exited(worker="n0.1", exit_code=-9))
    done = stage.assign(2, fence=1, round=2, fresh=False, put_down=("n0.1",))
    assert not of(done, m.Fork)
    assert told(done, Seated)["n0.3"].rank == 0


@pytest.mark.parametrize(("any_rank", "taken"), [(False, "n0.4"), (True, "n0.3")])
def test_another_chair_is_for_a_newcomer_unless_the_script_allows_any_rank(any_rank, taken):
    stage = Stage(standbys=1)
    stage.assign(1)
    stage.running()
    stage.os["parked"] = ("n0.3",)
    stage(m.Said(worker="n0.3", message=Join(worker="n0.3", pid=1, token="", any_rank=any_rank)))
    stage.look()
    stage(m.Exited(worker="n0.2", exit_code=-9))
    stage.assign(2, fence=1, round=2, fresh=False, put_down=("n0.2",))
    assert stage.report.chairs[1].worker == taken


def test_a_seat_waits_for_its_copies(stage):
    stage(m.Exited(worker="n0.1", exit_code=-9))
    fetch = Fetch(rank=1, step=5, tier="peer", source="n1:7")
    plan = Plan(step=5, tier="peer", receivers=(0, 1))
    done = stage.assign(2, fence=1, round=2, fresh=False, put_down=("n0.1",), fetch=(fetch,), plan=plan)
    assert of(done, m.VaultDo)[0].fetch == (fetch,)
    assert not told(done, Seated)
    stage.seals[1] = m.Seals(own="/own", snapshots={5: "/five"})
    stage.look()
    seated = told(stage(m.Vaulted(fetched=(fetch,), available=())), Seated)
    assert (seated["n0.2"].snapshot, seated["n0.2"].own) == ("/five", "/own")


def test_leaving_in_a_broken_step_is_a_consequence_and_after_the_loop_an_end(stage):
    stage.pages["n0.2"] = Record(round=1, step=9, phase="done")
    stage(m.Exited(worker="n0.2", exit_code=0))
    stage.look()
    assert stage.report.chairs[1].state == "finished"
    assert not stage.report.findings
    stage.assign(2, fence=1)
    stage(m.Exited(worker="n0.1", exit_code=0))
    stage.look()
    assert stage.report.chairs[0].state == "dead"
    assert stage.report.findings[0].consequence


def test_an_exception_is_one_finding_and_its_exit_none(stage):
    raised = Raised(step=5, round=1, fingerprint="ValueError", text="ValueError: x", consequence=False)
    assert of(stage(m.Said(worker="n0.1", message=raised)), m.Fence)
    stage(m.Exited(worker="n0.1", exit_code=1))
    assert [(f.kind, f.fingerprint, f.step) for f in stage.report.findings] == [("exception", "ValueError", 5)]


def test_who_does_not_end_after_its_exception_is_killed(stage):
    stage(m.Said(worker="n0.1", message=Raised(step=5, round=1, fingerprint="E", text="E", consequence=False)))
    assert of(stage(m.Tick(), 2.1), m.Kill) == [m.Kill(worker="n0.1", signal=9)]


def test_suspicion_of_an_older_round_is_no_news(stage):
    assert not of(stage(m.Said(worker="n0.1", message=Suspect(round=0, text="x"))), m.Fence)
    assert of(stage(m.Said(worker="n0.1", message=Suspect(round=1, text="x"))), m.Fence)
    assert not of(stage(m.Said(worker="n0.2", message=Suspect(round=1, text="x"))), m.Fence)


def test_a_successor_hears_where_the_minutes_of_a_set_up_end():
    stage = Stage()
    stage.assign(1)
    stage(m.Said(worker="n0.1", message=Join(worker="n0.1", pid=1, token="")))
    stage(m.Said(worker="n0.1", message=Recorded(rank=0, index=0, key="seed", payload=b"1")))
    stage(m.Exited(worker="n0.1", exit_code=-9))
    assert stage.report.chairs[0].minuted
    done = stage.assign(2, fence=1, round=2, put_down=("n0.1",), fresh=False)
    assert [(f.role, f.rank) for f in of(done, m.Fork)] == [("standby", 0)]
    done = stage(m.Said(worker="n0.3", message=Recall(rank=0, index=0)))
    assert told(done, Recorded)["n0.3"].last
    assert told(stage(m.Said(worker="n0.3", message=Recall(rank=0, index=1))), Unrecorded)["n0.3"].index == 1


def test_a_set_up_that_cannot_be_gone_on_with_is_a_fault_of_the_group(stage):
    assert of(stage(m.Said(worker="n0.1", message=Unrepeatable(reason="sends"))), m.Fence)
    assert (stage.report.findings[0].kind, stage.report.findings[0].text) == ("unrecorded", "sends")


def test_set_up_results_are_kept_shared_and_given(stage):
    for rank in (0, 1):
        stage(m.Said(worker=f"n0.{rank + 1}", message=Layout(rank=rank, digest="d", replicated=True, own_bytes=1, snapshot_bytes=0)))
    item = Recorded(rank=0, index=0, key="seed", payload=b"1")
    assert of(stage(m.Said(worker="n0.1", message=item)), m.Keep)
    assert told(stage(m.Said(worker="n0.2", message=Recall(rank=0, index=0))), Recorded)["n0.2"] == item
    stage(m.Said(worker="n0.2", message=Recall(rank=0, index=1)))
    late = Recorded(rank=0, index=1, key="seed", payload=b"2")
    done = stage(m.Said(worker="", message=late))  # with a Fetch
    assert told(done, Recorded)["n0.2"] == late
    assert of(done, m.Keep), "our peers are others than those of the node that it came from"
    assert not of(stage(m.Said(worker="", message=late)), m.Keep)
    assert not of(stage(m.Said(worker="", message=Recorded(rank=0, index=2, key="k", payload=b"", restart=1))), m.Keep), "of another start"


def test_a_set_up_too_large_to_keep_is_refused_clearly(stage, monkeypatch):
    monkeypatch.setattr("resilient.core.minutes.BYTES_MAX", 10)
    stage(m.Said(worker="n0.1", message=Recorded(rank=0, index=0, key="seed", payload=b"x" * 20)))
    done = stage(m.Said(worker="n0.1", message=Recall(rank=0, index=0)))
    assert "larger than what is kept" in told(done, Leave)["n0.1"].reason
    assert stage.report.findings[0].kind == "unrecorded"


def test_layouts_are_allocated_and_answered(stage):
    layout = Layout(rank=0, digest="d", replicated=True, own_bytes=1, snapshot_bytes=0)
    assert of(stage(m.Said(worker="n0.1", message=layout)), m.Allocate)
    assert (stage.report.chairs[0].replicated, stage.report.chairs[0].layout) == (True, "d")
    segments = Segments(rank=0, own="/own", own_bytes=1, slots=(), snapshot_bytes=0, error="no room")
    assert told(stage(m.Allocated(worker="n0.1", segments=segments)), Segments)
    assert stage.report.findings[0].kind == "allocation"


def test_a_group_that_starts_again_keeps_nothing_of_the_old_one():
    stage = Stage(standbys=1)
    stage.assign(1)
    stage.running()
    stage(m.Said(worker="n0.1", message=Recorded(rank=0, index=0, key="seed", payload=b"1")))
    stage(m.Exited(worker="n0.1", exit_code=-9))
    done = stage.assign(2, fence=1, round=2, restart=1, put_down=("n0.1", "n0.2"))
    assert {k.worker for k in of(done, m.Kill)} == {"n0.2", "n0.3"}
    assert [(f.role, f.rank, f.restart) for f in of(done, m.Fork)] == [("rank", 0, 1), ("rank", 1, 1)]
    assert not told(stage(m.Said(worker="n0.4", message=Recall(rank=0, index=0))), Recorded)
    assert not of(stage(m.Exited(worker="n0.2", exit_code=-9)), m.Fence), "we killed it ourselves"


def test_a_stopped_rank_is_found_after_its_evidence(stage):
    stage.os["n0.1"] = "T"
    found = []
    for _ in range(30):
        found += stage.look(0.05)
    kinds = [type(a) for a in found if not isinstance(a, m.SendReport)]
    assert kinds[:2] == [m.Evidence, m.Fence]
    assert stage.report.findings[0].kind == "stopped"
    assert set(of(found, m.Evidence)[0].workers) == {"n0.1", "n0.2"}


def test_evidence_is_saved_before_the_fence_when_another_node_asks(stage):
    done = stage.assign(2, fence=1, evidence=1)
    kinds = [type(a) for a in done]
    assert kinds.index(m.Evidence) < kinds.index(m.Fence)


def test_standbys_that_die_again_and_again_are_given_up():
    stage = Stage(standbys=1)
    stage.assign(1)
    stage.running()
    for number in range(3, 6):
        stage(m.Exited(worker=f"n0.{number}", exit_code=1))
    assert [f.kind for f in stage.report.findings] == ["standby_lost"] * 3 + ["standbys_off"]
    assert not stage.report.standbys
    assert not of(stage.done, m.Fence)


def test_a_zygotes_death_voids_the_forks_it_owed(stage):
    agent, now = stage.agent, stage.now
    agent.step(m.Exited(worker="n0.1", exit_code=-9), now)
    agent.step(stage.looked(1), now)
    new = Assignment(
        run="r",
        node="n0",
        seq=2,
        fence=1,
        round=2,
        world_size=2,
        put_down=("n0.1",),
        seats=(Seat(rank=0, local_rank=0), Seat(rank=1, local_rank=1)),
    )
    assert [f.worker for f in of(agent.step(m.Assigned(assignment=new), now), m.Fork)] == ["n0.3"]
    assert m.Forget(worker="n0.3") in agent.step(m.ZygoteDown(reason="killed"), now)
    assert [f.worker for f in of(agent.step(m.ZygoteUp(), now), m.Fork)] == ["n0.4"]


def test_a_failed_fork_is_a_fault(stage):
    stage(m.Exited(worker="n0.1", exit_code=-9))
    stage.agent._zygote = False
    stage.assign(2, fence=1, round=2, fresh=False, put_down=("n0.1",))
    stage(m.ForkFailed(worker="n0.3", reason="no page: /dev/shm is full"))
    assert (stage.report.findings[-1].kind, stage.report.fenced) == ("fork_failed", 2)


def test_a_lost_store_is_started_again():
    stage = Stage(hosts_store=True)
    assert of(stage.done, m.StartStore)
    stage(m.StoreUp(addr="n0:1"))
    assert stage.report.store == "n0:1"
    stage.assign(1)
    stage.running()
    done = stage(m.StoreDown(reason="killed"))
    assert of(done, m.StartStore)
    assert of(done, m.Fence)
    assert not of(stage(m.StoreDown(reason="no port")), m.StartStore), "not at once again"
    assert of(stage(m.Tick(), 1.1), m.StartStore)


def test_the_end_is_in_order():
    stage = Stage(standbys=1)
    stage.assign(1)
    stage.running()
    for worker in ("n0.1", "n0.2"):
        stage.pages[worker] = Record(round=1, step=9, phase="done")
        stage(m.Exited(worker=worker, exit_code=0))
    stage.look()
    done = stage.assign(2, state="finished")
    assert set(told(done, Leave)) == {"n0.3"}
    assert not of(done, m.Finished)
    done = stage(m.Exited(worker="n0.3", exit_code=0))
    assert [type(a) for a in done][-2:] == [m.SendReport, m.Finished]
    assert stage.agent.deadline() is None
    assert stage(m.Tick()) == []


def test_a_signal_ends_everything_gently_then_not(stage):
    done = stage(m.Stop(signal=15))
    assert of(done, m.Kill) == [m.Kill(worker="n0.1", signal=15), m.Kill(worker="n0.2", signal=15)]
    assert stage.report.leaving
    stage(m.Exited(worker="n0.1", exit_code=-15))
    assert of(stage(m.Tick(), 30.0), m.Kill) == [m.Kill(worker="n0.2", signal=9)]
    assert of(stage(m.Exited(worker="n0.2", exit_code=-9)), m.Finished) == [m.Finished(exit_code=1, message="signal 15")]


def test_a_signal_with_a_grace_waits_until_what_is_sealed_is_safe():
    stage = Stage(grace_s=24.0)
    stage.assign(1)
    stage.running()
    stage(m.Stop(signal=15))
    stage.assign(2, state="failed", wait=True, message="told to stop")
    assert of(stage(m.Tick(), 8.0), m.Kill) == [m.Kill(worker="n0.1", signal=9), m.Kill(worker="n0.2", signal=9)], "a third of it"
    for worker in ("n0.1", "n0.2"):
        assert not of(stage(m.Exited(worker=worker, exit_code=-9)), m.Finished)
    assert [chair.state for chair in stage.report.chairs] == ["dead", "dead"]
    done = stage.assign(3, state="failed", wait=True, message="told to stop", rescue=7)
    assert of(done, m.VaultDo)[0].rescue == 7
    done = stage.assign(4, state="failed", message="told to stop; step 7 is safe")
    assert stage.report.assigned == 4
    assert of(done, m.Finished) == [m.Finished(exit_code=1, message="told to stop; step 7 is safe")]


def test_the_grace_ends_also_without_a_word():
    stage = Stage(grace_s=24.0)
    stage.assign(1)
    stage.running()
    stage(m.Stop(signal=15))
    for worker in ("n0.1", "n0.2"):
        stage(m.Exited(worker=worker, exit_code=-15))
    assert not of(stage(m.Tick(), 23.9), m.Finished)
    assert of(stage(m.Tick(), 0.1), m.Finished) == [m.Finished(exit_code=1, message="signal 15")]


def test_a_warning_is_a_finding_and_ends_nothing(stage):
    stage(m.Warned(text="SIGUSR1"))
    (finding,) = stage.report.findings
    assert (finding.kind, finding.text) == ("warning", "SIGUSR1")
    assert stage.report.fenced == 0


def test_without_a_coordinator_the_node_ends_with_a_clear_message(stage):
    assert stage.agent.deadline() <= stage.now + 30.0
    done = stage(m.Tick(), 30.0)
    assert {k.signal for k in of(done, m.Kill)} == {15}
    for worker in ("n0.1", "n0.2"):
        done = stage(m.Exited(worker=worker, exit_code=-15))
    assert of(done, m.Finished) == [m.Finished(exit_code=1, message="no word from the coordinator for 30 s", over=False)]


def test_a_coordinator_that_was_started_again_is_not_obeyed(stage):
    """It knows nothing of the round in force; what this node holds is left to its next start."""
    new = msgspec.structs.replace(stage.agent.assignment, term=7, seq=1, state="forming", round=0)
    done = stage(m.Assigned(assignment=new))
    assert {k.signal for k in of(done, m.Kill)} == {15}
    for worker in ("n0.1", "n0.2"):
        done = stage(m.Exited(worker=worker, exit_code=-15))
    (finished,) = of(done, m.Finished)
    assert (finished.exit_code, finished.over) == (1, False)
    assert "the coordinator was started again" in finished.message


def test_looks_are_frequent_while_a_round_forms_only():
    stage = Stage()
    stage.assign(1)
    stage(m.Said(worker="n0.1", message=Join(worker="n0.1", pid=1, token="")))
    assert stage.agent.look_every_s() == 0.005
    stage.running()
    assert stage.agent.look_every_s() == 0.05


def test_logs_and_strangers(stage):
    assert of(stage(m.Said(worker="n0.1", message=Marked(step=1, scalars={"loss": 1.0}))), m.Log)[0].rank == 0
    assert set(told(stage(m.Said(worker="n9.9", message=Join(worker="n9.9", pid=1, token=""))), Leave)) == {"n9.9"}


def test_a_link_that_comes_back_gets_a_report(stage):
    assert of(stage(m.LinkUp()), m.SendReport)
    assert not of(stage(m.LinkDown()), m.SendReport)


def see(stage, *findings):
    stage(m.Probed(findings=tuple(Finding(seq=0, probe="kernel-log", **facts) for facts in findings)))
    return {f.device: f for f in stage.report.findings if f.probe}


def test_a_findings_device_is_somebodys(stage):
    stage(m.Devices(local_ranks={"pci:0000:1a:00": 1}))
    pid = stage.report.chairs[0].pid
    forms = [
        "rank:1",
        "rank:9",
        "local_rank:0",
        f"pid:{pid}",
        "pid:1",
        "gpu:1",
        "gpu:7",
        "pci:0000:1a:00",
        "pci:0000:ff:00",
        "cpu:0",
        "",
        "dev:a,gpu:0",
    ]
    found = see(stage, *({"kind": "xid", "device": device} for device in forms))
    assert {device: f.ranks for device, f in found.items()} == {
        "rank:1": (1,),
        "rank:9": (),
        "local_rank:0": (0,),
        f"pid:{pid}": (0,),
        "pid:1": (),
        "gpu:1": (1,),
        "gpu:7": (),
        "pci:0000:1a:00": (1,),
        "pci:0000:ff:00": None,
        "cpu:0": None,
        "": None,
        "dev:a,gpu:0": (0,),
    }
    assert found["gpu:1"].worker == stage.report.chairs[1].worker


def test_a_dead_process_is_remembered_by_its_number(stage):
    chair = stage.report.chairs[1]
    stage(m.Exited(worker=chair.worker, exit_code=-9))
    stage.assign(2, fence=1, round=2, put_down=(chair.worker,), fresh=False)
    stage.running(round=2)
    assert chair.worker not in stage.agent.crew.workers
    assert see(stage, {"kind": "oom-host", "device": f"pid:{chair.pid}"})[f"pid:{chair.pid}"].ranks == (1,)


def test_what_is_the_same_counts_as_one_and_a_storm_pushes_no_death_out(stage):
    chair = stage.report.chairs[1]
    stage(m.Exited(worker=chair.worker, exit_code=-9))
    stage(m.Probed(findings=tuple(Finding(seq=0, kind="sxid", code=str(i % 400), probe="k", role="symptom") for i in range(800))))
    stage(m.Probed(findings=(Finding(seq=0, kind="xid", code="79", probe="k"),)))
    found = stage.report.findings
    assert len(found) == 256
    assert {f.kind for f in found} == {"exit", "sxid", "xid"}
    assert {f.count for f in found if f.kind == "sxid"} == {2}
    assert [f.seq for f in found] == sorted(f.seq for f in found)


def test_a_gated_node_says_why_until_it_is_admitted():
    stage = Stage(gated=True)
    assert (stage.report.admitted, stage.report.admission) == (False, "its checks have not passed yet")
    stage(m.Admitted(passed=False, why="disk: 3 MB/s"))
    assert stage.report.admission == "its checks have not passed yet", "a better reason comes with the next report"
    stage(m.Tick(), after=2.0)
    assert stage.report.admission == "disk: 3 MB/s"
    stage(m.Admitted(passed=True))
    assert (stage.report.admitted, stage.report.admission) == (True, "")
    assert Stage().report.admitted
