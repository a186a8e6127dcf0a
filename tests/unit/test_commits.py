"""A checkpoint is committed when every rank's file is there and the leader wrote the marker."""

from __future__ import annotations

from resilient.core.commits import Commits
from resilient.core.messages import NONE, Persisted, Report


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
