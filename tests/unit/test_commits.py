"""A checkpoint is committed when every rank's file is there and the leader wrote the marker."""

from __future__ import annotations

from resilient.core.commits import Commits
from resilient.core.messages import NONE, Persisted, Refused, Report


def report(*files, node="n0", **more):
    return Report(
        run="r", node=node, boot=1, seq=1, persisted=tuple(Persisted(rank=r, step=s, num_bytes=1, digest="") for r, s in files), **more
    )


def test_all_ranks_then_the_leader():
    commits = Commits()
    assert commits.take(report((0, 10)), None, leads=True, world_size=2) == NONE
    assert commits.commit == NONE
    commits.take(report((1, 10), node="n1"), None, leads=False, world_size=2)
    assert commits.commit == 10
    assert [p.rank for p in commits.manifest] == [0, 1]
    assert commits.committed == set()
    assert commits.take(report(committed=10), None, leads=True, world_size=2) == 10
    assert commits.committed == {10}
    assert commits.take(report(committed=10), None, leads=True, world_size=2) == NONE


def test_the_newest_whole_step_wins_and_older_ones_are_dropped():
    commits = Commits()
    commits.take(report((0, 10), (0, 20), (1, 20)), None, leads=True, world_size=2)
    assert commits.commit == 20
    commits.take(report((1, 10), committed=20), None, leads=True, world_size=2)
    assert commits.commit == 20


def test_only_the_leader_says_what_is_committed():
    commits = Commits()
    assert commits.take(report(committed=10, available=(5,)), None, leads=False, world_size=2) == NONE
    assert commits.committed == set()
    commits.take(report(available=(5, 10)), None, leads=True, world_size=2)
    assert commits.committed == {5, 10}


def test_files_of_an_abandoned_attempt_are_not_taken():
    """Ranks 0 and 1 sealed step 20 in round 1; round 2 began at step 10; step 20 of both attempts must never be mixed."""

    def told(rank, round_, digest):
        item = Persisted(rank=rank, step=20, num_bytes=1, round=round_, digest=digest)
        return Report(run="r", node=f"n{rank}", boot=1, seq=1, persisted=(item,))

    commits = Commits()
    commits.begin(1, 0)
    commits.take(told(0, 1, "old"), None, leads=True, world_size=2)
    commits.begin(2, 10)
    commits.take(told(1, 1, "old"), None, leads=False, world_size=2)
    assert commits.commit == NONE
    commits.take(told(0, 2, "new"), None, leads=True, world_size=2)
    assert commits.commit == NONE, "rank 1 has only the abandoned one"
    commits.take(told(1, 2, "new"), None, leads=False, world_size=2)
    assert (commits.commit, [item.digest for item in commits.manifest]) == (20, ["new", "new"])


def test_a_file_that_was_written_anew_makes_another_manifest():
    commits = Commits()
    commits.take(report((0, 10), (1, 10)), None, leads=True, world_size=2)
    again = Report(run="r", node="n0", boot=1, seq=2, persisted=(Persisted(rank=0, step=10, num_bytes=2, digest="anew"),))
    commits.take(again, None, leads=True, world_size=2)
    assert [item.digest for item in commits.manifest] == ["anew", ""]


def test_nobody_waits_for_a_marker_that_will_not_be_written():
    commits = Commits()
    commits.take(report((0, 10), (1, 10)), None, leads=True, world_size=2)
    assert commits.asked
    differs = Refused(tier="persistent", step=10, rank=1, reason="", kind="replicas_differ")
    commits.take(report((0, 10), (1, 10), refused=(differs,)), None, leads=True, world_size=2)
    assert not commits.asked


def refused(step, *, damaged=True, node="n1", **more):
    copy = Refused(tier="persistent", step=step, rank=1, reason="a flipped bit", damaged=damaged)
    return Report(run="r", node=node, boot=1, seq=2, refused=(copy,), **more)


def written(rank, step, round_):
    item = Persisted(rank=rank, step=step, num_bytes=1, round=round_, digest="new" if round_ else "old")
    return Report(run="r", node=f"n{rank}", boot=1, seq=3, persisted=(item,))


def test_a_damaged_step_is_committed_anew_by_files_that_were_all_written_since():
    commits = Commits()
    first = report(available=(10, 20))
    commits.take(first, None, leads=True, world_size=2)
    commits.take(refused(20), None, leads=False, world_size=2)
    assert (commits.committed, commits.sound, commits.wrong) == ({10, 20}, {10}, {20}), "it is still known that there was one"
    commits.take(written(1, 20, 2), None, leads=False, world_size=2)
    commits.take(written(0, 20, 0), first, leads=True, world_size=2)
    assert commits.commit == NONE, "of rank 0 there is only what the damaged one had"
    commits.take(written(0, 20, 2), written(0, 20, 0), leads=True, world_size=2)
    assert (commits.commit, [item.digest for item in commits.manifest], commits.asked) == (20, ["new", "new"], True)
    assert commits.take(report(committed=20), first, leads=True, world_size=2) == 20
    assert (commits.sound, commits.wrong, commits.asked) == ({10, 20}, set(), False)
    assert commits.take(refused(20), refused(20), leads=False, world_size=2) == NONE
    assert commits.wrong == set(), "what was said before counts once"


def test_what_this_run_has_committed_may_be_found_damaged_later():
    commits = Commits()
    said = report((0, 20), (1, 20), committed=20)
    commits.take(said, None, leads=True, world_size=2)
    commits.take(refused(20), None, leads=False, world_size=2)
    assert commits.sound == set()
    commits.take(said, said, leads=True, world_size=2)
    assert commits.sound == set(), "the leader has not heard of it yet"
    forgotten = report()
    commits.take(forgotten, said, leads=True, world_size=2)
    commits.take(report(committed=20), forgotten, leads=True, world_size=2)
    assert commits.sound == {20}


def test_storage_that_did_not_answer_makes_nothing_wrong():
    commits = Commits()
    commits.take(report(available=(10, 20)), None, leads=True, world_size=2)
    commits.take(refused(20, damaged=False), None, leads=False, world_size=2)
    assert commits.sound == {10, 20}
