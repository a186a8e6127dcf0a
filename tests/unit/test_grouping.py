"""One cause and its consequences are one incident, on as many nodes as they are."""

from __future__ import annotations

from resilient_agents.diagnosis.grouping import Sighting, incidents
from resilient_agents.diagnosis.text import classify

XID = "NVRM: Xid (PCI:0000:1a:00): 79, pid=0, GPU has fallen off the bus."
SXID = "nvidia-nvswitch0: SXid (PCI:0000:85:00.0): 20034, Fatal, Link 30 LTSSM Fault Up"
ECHO = "NVRM: Xid (PCI:0000:1a:00): 45, pid=4711, name=python3, Ch 00000010"
WATCHDOG = (
    "[rank{}]:[E ProcessGroupNCCL.cpp:632] [Rank {}] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=12, OpType=ALLREDUCE)"
)


def seen(text, stream="kmsg", node="n1", t=None, place=0, clock="wall"):
    return Sighting(
        finding=classify(text, stream), node=node, t=t, clock=clock if t is not None else "", place=place, source=f"{node}:{place}"
    )


def test_a_lost_gpu_and_its_hundreds_of_echoes_are_one_incident():
    told = [seen(WATCHDOG.replace("{}", str(rank)), "stderr", f"n{rank // 8}", 100.0 + rank / 100, rank) for rank in range(16, 200)]
    told += [seen(ECHO, t=92.1, place=901), seen(SXID, t=91.5, place=902), seen(XID, t=91.0, place=903)]
    (it,) = incidents(told)
    assert (it.verdict, it.culprit) == ("replace", "pci:0000:1a:00 on n1")
    assert it.cause.finding.code == "79"
    assert dict(it.consequences)["nccl-timeout"] == 184
    assert [other.finding.code for other in it.also] == ["20034"]
    assert (it.begin, it.count) == (91.0, 187)


def test_what_is_far_apart_in_time_is_two_incidents():
    assert len(incidents([seen(XID, t=10.0), seen(XID, t=500.0, place=1)])) == 2
    assert len(incidents([seen(XID, t=10.0), seen(XID, t=100.0, place=1)])) == 1
    assert len(incidents([seen(XID, t=10.0), seen(XID, t=100.0, place=1)], window_s=30.0)) == 2


def test_clocks_that_cannot_be_compared_are_one_incident_where_each_tells_of_one():
    told = [seen(XID, t=733102.5, clock="boot"), seen(WATCHDOG, "stderr", "n2", t=1.7e9, place=1), seen("Killed", "stderr", "n3", place=2)]
    (it,) = incidents(told)
    assert it.cause.finding.code == "79"


def test_the_same_on_many_nodes_is_shared_infrastructure():
    line = "nfs: server storage-7 not responding, timed out"
    (it,) = incidents([seen(line, node=f"n{i}", t=float(i), place=i) for i in range(5)])
    assert it.culprit == ""
    assert it.shared == ("n0", "n1", "n2", "n3", "n4")
    (it,) = incidents([seen(line, node=f"n{i}", t=float(i), place=i) for i in range(2)])
    assert it.shared == ()


def test_a_users_exception_stays_the_users():
    told = [seen("KeyError: 'labels'", "stderr", t=1.0), seen("Closing process 393866 via signal SIGTERM", "stderr", t=2.0, place=1)]
    (it,) = incidents(told)
    assert it.verdict == "user"
    assert incidents(told[1:]) == []  # an echo of nothing


def test_what_came_right_again_is_no_incident():
    down, up = "mlx5_core 0000:18:00.0 mlx5_2: Port: 1 Link DOWN", "mlx5_core 0000:18:00.0 mlx5_2: Port: 1 Link ACTIVE"
    assert len(incidents([seen(down, t=1.0)])) == 1
    assert incidents([seen(down, t=1.0), seen(up, t=2.0, place=1)]) == []
    assert len(incidents([seen(down, t=1.0), seen(up.replace("mlx5_2", "mlx5_3"), t=2.0, place=1)])) == 1
    assert len(incidents([seen(down, t=1.0), seen(up, node="n2", t=2.0, place=1)])) == 1


def test_nothing_is_nothing():
    assert incidents([]) == []
    assert incidents([seen("all is well")]) == []
