"""Round: the seating in force, and how far its ranks have come.

Think of the seating plan on the foyer wall, with a pencil mark beside each row that has arrived.

Contract: plain bookkeeping for coordinator.py, which decides. `seat` puts up a new plan, `take` marks what a node's report says about
its chairs, O(chairs of that node). `fence == number` while the plan is not valid any more and no new one is up yet.
"""

from __future__ import annotations

from collections.abc import Mapping

from resilient.core import groups, holders
from resilient.core.messages import NONE, Assignment, Chair, ChairState, Member, Report, Seat
from resilient.core.seating import Seating


class Round:
    """The newest round."""

    def __init__(self, copies: int = 1, parity: int = 0) -> None:
        """Round 0: nobody is seated. copies: on how many other nodes each node is kept. parity: how many nodes keep it together, or 0."""
        self._copies, self._parity = copies, parity
        self.number = self.fence = self.restart = 0
        self.seating = Seating(places={})
        self.ranks: dict[str, tuple[int, ...]] = {}  # node -> its ranks, ascending
        self.activated: set[int] = set()  # ranks that finished the set-up since the group was last started
        self.uncommitted: set[str] = set()  # nodes whose ranks have not all committed in this round
        self.unfinished: set[str] = set()  # nodes with a rank that is not at its end
        self._states: dict[str, list[ChairState]] = {}  # node -> of its chairs, when they were last looked at
        self._fresh: frozenset[int] = frozenset()  # ranks whose script starts from its first line
        self._order: dict[str, int] = {}  # node -> torchrun's GROUP_RANK
        self._holders: dict[str, tuple[str, ...]] = {}  # node -> those that keep its copies
        self._groups: groups.Groups = ()  # of nodes that keep parity together
        self._group: dict[str, tuple[str, ...]] = {}  # node -> the one that it is in
        self._vaults: dict[str, str] = {}  # node -> address

    def seat(self, seating: Seating, reports: Mapping[str, Report]) -> None:
        """A new plan is up. reports: of the nodes that live."""
        if seating.again:
            self.restart += bool(self.ranks)
            self.activated.clear()
        self.number, self.seating = self.fence + 1, seating
        self._fresh = frozenset(seating.emptied) if seating.again else frozenset()
        ranks: dict[str, list[int]] = {}
        for rank, place in sorted(seating.places.items()):
            ranks.setdefault(place.node, []).append(rank)
        self.ranks = {node: tuple(held) for node, held in ranks.items()}
        self._order = {node: i for i, node in enumerate(self.ranks)}
        self._vaults = {node: reports[node].vault for node in self.ranks}
        domains = {node: reports[node].failure_domain for node in self.ranks}
        self._holders = holders.choose(domains, self._copies, self._holders)
        if self._parity:
            self._groups = groups.choose(domains, self._parity, self._groups)
            self._group = {node: group for group in self._groups for node in group if len(group) > 1}
        self.uncommitted, self.unfinished = set(self.ranks), set(self.ranks)
        self._states.clear()

    def take(self, report: Report, *, managed: bool) -> None:
        """What a node's chairs say. managed: the group uses this library."""
        if report.round != self.number or report.node not in self.ranks:
            return
        states = [c.state for c in report.chairs]
        if report.node not in self.uncommitted and self._states.get(report.node) == states:
            return  # nothing that counts here; of 100,000 ranks almost every report
        self._states[report.node] = states
        chairs = [c for c in report.chairs if c.rank in self.seating.places]
        self.activated.update(c.rank for c in chairs if c.state in ("active", "finished") and c.record and c.record.phase != "setup")
        if self.fence == self.number or len(chairs) < len(self.ranks[report.node]):
            return
        if all(c.state == "finished" for c in chairs):
            self.unfinished.discard(report.node)
        if report.node in self.uncommitted and all(self._arrived(c, managed=managed) for c in chairs):
            self.uncommitted.discard(report.node)

    def _arrived(self, chair: Chair, *, managed: bool) -> bool:
        """Whether the start, or the fault, is over for this rank."""
        if chair.state == "finished":
            return True
        if not managed:
            return chair.state == "starting" and chair.pid > 0
        record = chair.record if chair.state == "active" else None
        return record is not None and record.round == self.number and (record.committed_s > 0 or record.phase == "done")

    def sheet(self, run: str, node: str) -> Assignment:
        """What the plan says for one node; the rest of the assignment is the coordinator's to fill in."""
        seating = self.seating
        return Assignment(
            run=run,
            node=node,
            seq=0,
            fence=self.fence,
            round=self.number,
            world_size=len(seating.places),
            node_rank=self._order.get(node, NONE),
            nodes=len(self.ranks),
            seats=tuple(Seat(rank=r, local_rank=seating.places[r].local_rank, fresh=r in self._fresh) for r in self.ranks.get(node, ())),
            plan=seating.plan,
            put_down=seating.put_down.get(node, ()),
            peers=tuple(self._vaults[holder] for holder in self._holders.get(node, ())),
            fetch=seating.fetch.get(node, ()),
            elders=seating.elders,
            restart=self.restart,
            group=tuple(Member(vault=self._vaults[member], ranks=self.ranks[member]) for member in self._group.get(node, ())),
        )
