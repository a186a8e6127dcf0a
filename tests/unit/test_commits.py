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
