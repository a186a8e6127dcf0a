"""One sheet per round: who stays, who goes, who brings what."""

from __future__ import annotations

import msgspec

from resilient.core.messages import Chair, Fetch, Holding, Parity, Rebuild, Record, Report
from resilient.core.placement import Place
from resilient.core.seating import Hall, seat


def chair(rank, state="active", step=5, phase="running", round=1, **more):
    record = Record(round=round, step=step, phase=phase) if state in ("active", "dead", "finished", "joined") else None
    facts = {"replicated": True, "layout": "net", "minuted": True, "own_step": step, "own_steps": (step - 1, step), **more}
    return Chair(rank=rank, local_rank=rank, state=state, worker=f"w{rank}", record=record, **facts)


def report(node, *chairs, **more):
    facts = {"slots": 2, "host": node, "data_port": 7, "round": 1, **more}
    return Report(run="r", node=node, boot=1, seq=1, chairs=chairs, **facts)


def hall(*reports, ranks=None, **more):
    places = ranks or {c.rank: Place(node=r.node, local_rank=c.local_rank, why="") for r in reports for c in r.chairs}
    facts = {"activated": frozenset(places), "managed": True, **more}
    return Hall(round=2, places=places, reports={r.node: r for r in reports}, **facts)


def test_a_dead_rank_is_replaced_and_nobody_else_moves():
    sheet = seat(hall(report("n0", chair(0), chair(1, "dead"))))
    assert (sheet.emptied, sheet.put_down, sheet.again) == ((1,), {"n0": ("w1",)}, False)
    assert (sheet.plan.tier, sheet.plan.receivers, sheet.plan.sources) == ("live", (1,), (0,))
    assert not sheet.fetch


def test_a_condemned_worker_loses_its_chair_alive():
    sheet = seat(hall(report("n0", chair(0), chair(1)), condemned=frozenset({"w1"})))
    assert sheet.put_down == {"n0": ("w1",)}


def test_a_newcomer_on_its_way_keeps_the_chair():
    sheet = seat(hall(report("n0", chair(0), chair(1, "joined", phase="setup", round=0))))
    assert (sheet.emptied, sheet.put_down) == ((), {})
    assert sheet.plan.receivers == (1,)


def test_a_lost_nodes_chairs_move_to_the_holder_with_their_copies():
    ranks = {0: Place(node="n0", local_rank=0, why=""), 1: Place(node="n1", local_rank=0, why="")}
    held = Holding(rank=1, own_step=5, own_steps=(4, 5))
    sheet = seat(hall(report("n0", chair(0), holdings=(held,), spares=1), ranks=ranks))
    assert (sheet.places[1].node, sheet.emptied, sheet.put_down) == ("n0", (1,), {})
    assert sheet.fetch == {"n0": (Fetch(rank=1, step=5, tier="peer", source="n0:7", round=2),)}
    assert sheet.plan.tier == "live"
    assert "holds its copies" in sheet.why[1]


def test_a_moved_shard_is_fetched_from_its_holder():
    ranks = {0: Place(node="n0", local_rank=0, why=""), 1: Place(node="n1", local_rank=0, why="")}
    shard = {"replicated": False, "snapshots": (4, 5)}
    holder = report("n2", holdings=(Holding(rank=1, own_step=5, snapshots=(4, 5)),))
    sheet = seat(hall(report("n0", chair(0, **shard), spares=5), holder, ranks=ranks))
    assert sheet.plan.tier in ("memory", "peer")
    assert sheet.places[1].node == "n2", "the holder has room"


def test_a_lost_shard_is_put_together_from_parity():
    """Its own state lies whole on n1; the step is the newest that is in parity everywhere and that the others still have."""
    places = {rank: Place(node=f"n{rank}", local_rank=0, why="") for rank in range(3)}

    def survivor(rank, *steps, number, slots=1, **more):
        parities = tuple(Parity(rank=1 << 24, step=s, stripes=2, parts=((0, number), (3 - rank, 1 - number))) for s in steps)
        shard = {"replicated": False, "snapshots": (4, 5)}
        return report(f"n{rank}", chair(rank, **shard), parities=parities, slots=slots, **more)

    held = (Holding(rank=0, own_step=5, own_steps=(4, 5)),)
    reports = (survivor(1, 3, 4, number=0, holdings=held), survivor(2, 4, 5, number=1), report("new"))
    sheet = seat(hall(*reports, ranks=places))
    assert (sheet.plan.tier, sheet.plan.step, sheet.places[0].node) == ("peer", 4, "new")
    sources = Rebuild(stripes=(("n1:7", 1 << 24), ("n2:7", 1 << 24)), others=((1, "n1:7"), (2, "n2:7")))
    assert sheet.fetch["new"] == (Fetch(rank=0, step=4, tier="peer", source="n1:7", round=2, rebuild=sources),)
    refused = seat(hall(*reports, ranks=places, poison=frozenset({("peer", 4, 0)}), committed=frozenset({2})))
    assert (refused.plan.tier, refused.plan.step) == ("persistent", 2)


def test_a_newcomer_without_the_minutes_of_its_set_up_makes_the_group_start_again():
    shard = {"replicated": False, "own_steps": (), "own_step": -1}
    places = {rank: Place(node=f"n{rank}", local_rank=0, why="") for rank in range(2)}
    restarted = hall(report("n0", chair(0, **shard)), report("n1"), ranks=places, committed=frozenset({3}))
    sheet = seat(restarted)
    assert (sheet.again, sheet.plan.tier, sheet.emptied, sheet.put_down) == (True, "persistent", (0, 1), {"n0": ("w0",)})
    assert "minutes" in " ".join(sheet.why)


def test_a_node_that_comes_back_gives_up_the_workers_of_chairs_that_have_moved():
    places = {0: Place(node="n0", local_rank=0, why=""), 1: Place(node="n2", local_rank=0, why="")}
    held = Holding(rank=1, own_step=5, own_steps=(4, 5))
    sheet = seat(hall(report("n0", chair(0), holdings=(held,), slots=1), report("n1", chair(1, step=3)), ranks=places))
    assert (sheet.places[1].node, sheet.put_down) == ("n1", {"n1": ("w1",)})


def test_no_room_is_said():
    ranks = {
        0: Place(node="n0", local_rank=0, why=""),
        1: Place(node="n0", local_rank=1, why=""),
        2: Place(node="n1", local_rank=0, why=""),
    }
    assert seat(hall(report("n0", chair(0), chair(1)), ranks=ranks)).homeless == (2,)


def test_a_group_that_does_not_use_this_library_starts_again_whole():
    sheet = seat(hall(report("n0", chair(0, "starting"), chair(1, "dead")), managed=False))
    assert (sheet.again, sheet.emptied, sheet.put_down) == (True, (0, 1), {"n0": ("w0", "w1")})


def test_a_fault_during_start_up_keeps_those_who_were_not_seated():
    unseated, seated = (
        chair(0, "joined", phase="setup", round=0, own_steps=(), own_step=-1),
        chair(1, "joined", phase="setup", own_steps=(), own_step=-1),
    )
    dead = chair(2, "dead", phase="setup", round=0, own_steps=(), own_step=-1)
    sheet = seat(hall(report("n0", unseated, seated, dead), activated=frozenset()))
    assert (sheet.again, sheet.emptied, sheet.put_down) == (False, (2,), {"n0": ("w2",)})
    sheet = seat(hall(report("n0", unseated, seated, dead), activated=frozenset(), again=True))
    assert (sheet.again, sheet.emptied, sheet.put_down) == (True, (1, 2), {"n0": ("w1", "w2")})


def test_leaving_the_loop_early_empties_the_chair_when_others_go_on():
    sheet = seat(hall(report("n0", chair(0), chair(1, "finished"))))
    assert sheet.put_down == {"n0": ("w1",)}


def test_finished_ranks_need_nothing():
    over = chair(0, "finished", phase="done", snapshots=(5,))
    sheet = seat(hall(report("n0", over, chair(1, "dead", phase="done", snapshots=(5,)))))
    assert (sheet.emptied, sheet.plan.receivers, sheet.plan.over, sheet.plan.tier) == ((1,), (1,), True, "memory")


def test_persistent_state_is_fetched_for_every_chair():
    shard = {"replicated": False, "own_steps": (), "own_step": -1}
    sheet = seat(hall(report("n0", chair(0, **shard), chair(1, "dead", **shard)), committed=frozenset({3})))
    assert sheet.plan.tier == "persistent"
    assert sheet.fetch == {"n0": tuple(Fetch(rank=r, step=3, tier="persistent", round=2) for r in range(2))}
    assert (sheet.put_down, sheet.reached) == ({"n0": ("w1",)}, 5)


def test_a_fault_in_the_set_up_ends_nobody_else():
    setting_up = {"phase": "setup", "step": -1, "own_steps": (), "layout": ""}
    sheet = seat(hall(report("n0", chair(0, "joined", **setting_up), chair(1, "dead", **setting_up)), activated=frozenset()))
    assert (sheet.emptied, sheet.put_down, sheet.again) == ((1,), {"n0": ("w1",)}, False)
    assert (sheet.plan.step, sheet.plan.starting, sheet.plan.receivers) == (-1, True, ())


def test_a_fault_while_others_have_not_come_to_their_first_step():
    at_zero = {"step": 0, "own_steps": (0,)}
    setting_up = {"phase": "setup", "step": -1, "own_steps": (), "layout": ""}
    chairs = (chair(0, **at_zero), chair(1, "joined", **setting_up), chair(2, "dead", **at_zero))
    sheet = seat(hall(report("n0", *chairs, slots=3), activated=frozenset({0, 2})))
    assert (sheet.emptied, sheet.again, sheet.plan.step, sheet.plan.tier, sheet.plan.receivers) == ((2,), False, 0, "none", ())


def test_a_group_of_which_nobody_is_left_in_its_set_up_starts_again():
    setting_up = {"phase": "setup", "step": -1, "own_steps": (), "layout": ""}
    chairs = (chair(0, "dead", **setting_up), chair(1, "dead", **setting_up))
    assert seat(hall(report("n0", *chairs), activated=frozenset())).again
    assert seat(hall(report("n0", *chairs), activated=frozenset(), committed=frozenset({7}))).again


def test_what_a_world_of_another_size_left_is_cut_for_everybody():
    """Four ranks were, two are: both nodes are told who has what of all four; what looks like a rank's own is another world's."""
    held = [Holding(rank=rank, snapshots=(6, 7), world_size=4, native=True) for rank in range(4)]
    reports = {"n0": Report(run="r", node="n0", boot=1, seq=1, host="a", data_port=1, holdings=tuple(held[:2]))}
    reports["n1"] = Report(run="r", node="n1", boot=1, seq=1, host="b", data_port=1, holdings=tuple(held[2:]))
    places = {rank: Place(node=f"n{rank}", local_rank=0, why="") for rank in range(2)}
    start = Hall(round=1, places=places, reports=reports, managed=True, committed=frozenset({5}))
    found = seat(start)
    assert (found.plan.tier, found.plan.step, found.plan.origin) == ("peer", 7, 4)
    assert not any(found.fetch.values())
    assert [(e.rank, e.vaults) for e in found.elders] == [(0, ("a:1",)), (1, ("a:1",)), (2, ("b:1",)), (3, ("b:1",))]
    refused = seat(msgspec.structs.replace(start, poison=frozenset({("memory", 7, 2)})))
    assert (refused.plan.step, refused.plan.origin) == (6, 4)
    newer = seat(msgspec.structs.replace(start, committed=frozenset({7})))
    assert (newer.plan.tier, newer.plan.origin) == ("persistent", 0)


def test_what_a_predecessor_left_is_used_where_it_lies():
    held = [Holding(rank=rank, snapshots=(6, 7 + rank), world_size=2, native=True) for rank in range(2)]
    report = Report(run="r", node="n0", boot=1, seq=1, holdings=tuple(held))
    places = {rank: Place(node="n0", local_rank=rank, why="") for rank in range(2)}
    found = seat(Hall(round=1, places=places, reports={"n0": report}, managed=True))
    assert (found.plan.tier, found.plan.step) == ("memory", 6)
    assert not any(found.fetch.values())
