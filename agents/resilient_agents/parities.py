"""Parities: this node's part in the parity that its group keeps (checkpoint/parity.py), instead of whole copies of snapshots.

Think of neighbours who keep a common ledger of what is in each other's cellars: whoever has stored something new calls out; when all the
others have called out the same day's stores, each writes up his page, keeps yesterday's until it is written, and calls back "it is in".

Contract: a rank's newest snapshot is hashed and then offered to all others of the group. When the others' ranks of one place (their first
ones, second ones ...) have offered the same step, their stripes are fetched and laid over each other, into whichever of two slots is the
older: the last whole parity stays until the next one is sealed. Then the owners are told, and `copied` says how far a rank is in
parity everywhere: its worker passes the gate of a step only when the snapshot of its begin is (decision 6), so no slot is overtaken.
A stripe that breaks off is gone on with; where a snapshot is overwritten meanwhile its step is given up for the next one. A change of the
group makes everything be offered, and so laid, anew. Used from one event loop; bytes are moved and laid by threads.
Memory: two slots of a stripe's length for each rank of a node, and a piece for each connection at work.
Rejected: stripes pushed to their keeper (each needs memory of its own until all are there; fetched ones are laid as they come).
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from resilient.checkpoint import parity
from resilient.checkpoint.chest import Berth, Chest, MemoryTier
from resilient.checkpoint.haul import TCP, payload_place, pieces
from resilient.checkpoint.parity import PARITY, Content, Fold, Part, number_of, span
from resilient.checkpoint.peer import Peer
from resilient.checkpoint.pipe import Covered, Offer
from resilient.checkpoint.slot import Slot
from resilient.checkpoint.snapshot import slot_bytes
from resilient.checkpoint.tier import SnapshotKey
from resilient.checkpoint.transport import Transport
from resilient.core.messages import NONE, Fetch, Member, Parity
from resilient.errors import CheckpointError, SnapshotCorrupt, SnapshotMissing, TierUnavailable
from resilient_agents.copies import COPY_BYTES_S, COPY_S, REST_S
from resilient_agents.lane import Errands, Lane

OFFERS_MAX: Final = 1 << 16  # ranks of which one is remembered
OFFERED_STEPS: Final = 2  # of a rank: it has no more slots
Mark = tuple[str, int]  # slot, generation: one writing of it
log = logging.getLogger("resilient.vault")


@dataclass
class _Page:
    """What is being laid for one place."""

    content: Content
    step: int
    target: memoryview
    lock: threading.Lock = field(default_factory=threading.Lock)
    folds: dict[int, Fold] = field(default_factory=dict)  # rank -> what of its stripe is in


class Parities:
    """See the head of this file."""

    def __init__(
        self,
        memory: MemoryTier,
        lane: Lane,
        dial: Callable[[str], Peer],
        *,
        run: str,
        changed: Callable[[], None],
        transport: Transport = TCP,
    ) -> None:
        """`dial`: a client of that vault. `changed`: `known()` has."""
        self._memory, self._lane, self._run, self._changed, self._transport = memory, lane, run, changed, transport
        self._dial = dial
        self._group: tuple[Member, ...] = ()
        self._here = NONE  # our place in it
        self._address = ""
        self._peers: dict[str, Peer] = {}  # the others
        self._told: dict[tuple[str, int], Mark] = {}  # peer, rank -> what was offered
        self._telling: set[tuple[str, int]] = set()
        self._stamping: dict[int, asyncio.Lock] = {}
        self._resting: dict[str, float] = {}  # peer -> until
        self._offers: dict[int, dict[int, bytes]] = {}  # rank -> step -> header, in the order in which they came
        self._offered_by: dict[int, str] = {}  # rank -> vault, maybe of one that will be in the group as soon as we hear of it
        self._laying: set[int] = set()  # places
        self._laid: dict[int, tuple[int, Content]] = {}  # place -> the newest one
        self._arrived: dict[tuple[int, str], int] = {}  # rank of ours, keeper -> step
        self._contents: dict[Mark, Content] = {}
        self._said = ""  # why no parity is kept
        self._on_copied: Callable[[int], None] = lambda _rank: None
        self._errands = Errands()

    def watch(self, on_copied: Callable[[int], None]) -> None:
        """`on_copied(rank)` is called when `copied` of that rank may have changed."""
        self._on_copied = on_copied

    async def close(self) -> None:
        """Stop; what is under way is not finished."""
        await self._errands.close()
        for peer in self._peers.values():
            peer.close()

    # ------------------------------------------------------------------ what should be, what is

    def set_group(self, group: tuple[Member, ...], address: str) -> None:
        """Keep parity with these. `address`: which of them we are."""
        if group == self._group:
            return
        self._group, self._address = group, address
        self._here = next((place for place, member in enumerate(group) if member.vault == address), NONE)
        others = {member.vault for member in group} - {address} if self._here != NONE else set()
        for gone in self._peers.keys() - others:
            self._peers.pop(gone).close()
        for come in others - self._peers.keys():
            self._peers[come] = self._dial(come)
        self._told.clear()
        self._laid.clear()
        self._arrived.clear()
        for rank in [rank for rank, vault in self._offered_by.items() if vault != self._vault_of(rank)]:
            del self._offers[rank], self._offered_by[rank]
        self._consider()

    def copied(self, chest: Chest) -> int | None:
        """Newest step of this rank that is in parity on all others; None if none is kept of it."""
        if not self._peers or chest.replicated or chest.snapshots is None:
            return None
        return min(self._arrived.get((chest.rank, address), NONE) for address in self._peers)

    def known(self) -> tuple[Parity, ...]:
        """What is kept here."""
        found = []
        contents = {}
        for rank, chest in sorted(self._memory.chests.items()):
            for step, slot in chest.sealed("snapshot").items() if rank >= PARITY else ():
                mark = (slot.where, slot.generation())
                content = self._contents.get(mark) or _read(slot, rank, step)
                if content is not None:
                    contents[mark] = content
                    parts = tuple((part.rank, part.number) for part in content.parts)
                    found.append(Parity(rank=rank, step=step, stripes=content.stripes, parts=parts))
        self._contents = contents
        return tuple(found)

    def kept(self) -> set[int]:
        """The ranks that nobody sits on under which parity of this group is kept here."""
        return {PARITY + place for place in self._laid.keys() | self._laying}

    # ------------------------------------------------------------------ our own snapshots

    def look(self, chest: Chest) -> None:
        """Offer what is new, unless that is under way."""
        if chest.replicated or chest.snapshots is None or (slot := chest.snapshots.newest()) is None:
            return
        mark = (slot.where, slot.generation())
        for address in self._peers:
            about = (address, chest.rank)
            if about not in self._telling and self._told.get(about) != mark and self._answers(address):
                self._telling.add(about)
                self._errands.start(self._offer(address, chest.rank, slot, mark))

    async def _offer(self, address: str, rank: int, slot: Slot, mark: Mark) -> None:
        try:
            async with self._stamping.setdefault(rank, asyncio.Lock()):  # the offer to another one may be at it
                if not slot.is_stamped():
                    await self._lane.run(slot.stamp_payload, deadline_s=_deadline_s(slot.sealed_bytes()))
            step, header = slot.sealed_step(), slot.header()
            word = Offer(rank=rank, step=step, header=header, vault=self._address)
            if slot.generation() == mark[1] and step != NONE and await self._say(address, word):
                self._told[address, rank] = mark
        except SnapshotMissing:
            pass  # its writer was faster: the next look finds the newer one
        except CheckpointError as error:
            log.warning("not in parity: %s", error)
            self._told[address, rank] = mark  # nor tried again
        finally:
            self._telling.discard((address, rank))

    async def _say(self, address: str, word: Offer | Covered) -> bool:
        peer = self._peers.get(address)
        if peer is None:
            return False
        try:
            await peer.say(word)
        except CheckpointError as error:
            if address not in self._resting:
                log.warning("parity with %s waits: %s", address, error)
            self._resting[address] = time.monotonic() + REST_S
            return False
        self._resting.pop(address, None)
        return self._peers.get(address) is peer

    def _answers(self, address: str) -> bool:
        return self._resting.get(address, 0.0) <= time.monotonic()

    # ------------------------------------------------------------------ what the others say

    def heard(self, word: Offer | Covered) -> None:
        """Another vault said so."""
        if isinstance(word, Covered):
            self._arrived[word.rank, word.keeper] = word.step
            self._on_copied(word.rank)
        elif word.rank in self._offers or len(self._offers) < OFFERS_MAX:
            if self._offered_by.get(word.rank) != word.vault:
                self._offers[word.rank], self._offered_by[word.rank] = {}, word.vault
            steps = self._offers[word.rank]
            for later in [step for step in steps if step >= word.step]:  # of an attempt that was given up
                del steps[later]
            steps[word.step] = word.header
            for old in list(steps)[:-OFFERED_STEPS]:
                del steps[old]
            self._consider(again=word.rank)

    def _consider(self, *, again: int = NONE) -> None:
        """Lay what can be laid. `again`: this rank's owner may not know that it is in there."""
        for place in range(max((len(member.ranks) for member in self._group), default=0) if self._here != NONE else 0):
            wish = self._wish(place)
            if wish is None or place in self._laying:
                continue
            if self._laid.get(place) != wish:
                self._laying.add(place)
                self._errands.start(self._lay(place))
            elif again in {part.rank for part in wish[1].parts}:
                self._errands.start(self._tell(place, again))

    def _wish(self, place: int) -> tuple[int, Content] | None:
        """The newest step that all others have offered of their rank in this place, and what its parity consists of."""
        count = len(self._group)
        ranks = [(at, m.ranks[place]) for at, m in enumerate(self._group) if at != self._here and place < len(m.ranks)]
        steps = [self._offers.get(rank, {}) if self._offered_by.get(rank) == self._vault_of(rank) else {} for _, rank in ranks]
        common = set(steps[0]).intersection(*steps[1:]) if steps else set()
        if not common:
            return None
        step = max(common)
        parts = tuple(Part(rank, number_of(at, self._here, count), self._offers[rank][step]) for at, rank in ranks)
        return step, Content(count - 1, parts)

    async def _tell(self, place: int, only: int = NONE) -> None:
        """The owners hear that it is in."""
        if (laid := self._laid.get(place)) is not None:
            ranks = [part.rank for part in laid[1].parts if only in (NONE, part.rank)]
            words = [(self._vault_of(rank), Covered(rank=rank, step=laid[0], keeper=self._address)) for rank in ranks]
            await asyncio.gather(*(self._say(address, word) for address, word in words))  # one that hangs keeps no other waiting

    def _vault_of(self, rank: int) -> str:
        return next((member.vault for member in self._group if rank in member.ranks), "")

    # ------------------------------------------------------------------ laying

    async def _lay(self, place: int) -> None:
        """Until what is wished for lies there."""
        try:
            while (wish := self._wish(place)) is not None and self._laid.get(place) != wish:
                await self._lay_one(place, *wish)
                if self._laid.get(place) == wish:
                    self._changed()
                    await self._tell(place)
        except CheckpointError as error:
            if str(error) != self._said:
                log.warning("no parity is kept here for others: %s", error)
            self._said = str(error)
        finally:
            self._laying.discard(place)

    async def _lay_one(self, place: int, step: int, content: Content) -> None:
        """Raises TierUnavailable if there is no room here; what the others have to do with is tried again, or given up."""
        rank, num_bytes, own = PARITY + place, content.num_bytes(), content.encode()
        layout = parity.layout_of(num_bytes, rank)
        chest = self._memory.chest(rank)
        ring = await self._lane.run(
            lambda: chest.grow_snapshots(slot_bytes(len(layout), 2 * len(own), num_bytes)), deadline_s=_deadline_s(num_bytes)
        )
        target = ring.begin(run=self._run, rank=rank, world_size=0, round=0, layout=layout, own=own, payload_bytes=num_bytes)
        page = _Page(content, step, target)
        await self._lane.run(lambda: _clear(target), deadline_s=_deadline_s(num_bytes))
        waits = False
        while self._wish(place) == (step, content):
            try:
                await _all(self._fetch_part(page, part) for part in content.parts)
                break
            except SnapshotMissing as error:
                log.info("parity of step %d is given up: %s", step, error)
                for part in content.parts:
                    self._offers.get(part.rank, {}).pop(step, None)
                return
            except (TierUnavailable, SnapshotCorrupt) as error:
                if not waits:
                    log.warning("parity of step %d waits: %s", step, error)
                waits = True
                await asyncio.sleep(REST_S / 4)
        else:
            return
        ring.seal(step)
        slot = ring.get(step)
        await self._lane.run(slot.stamp_payload, deadline_s=_deadline_s(num_bytes))
        self._laid[place] = (step, content)

    async def _fetch_part(self, page: _Page, part: Part) -> None:
        begin, end = span(part.header, page.content.stripes, part.number)
        if part.rank not in page.folds:
            page.folds[part.rank] = Fold(page.target[: end - begin], page.lock, transport=self._transport)
        peer = self._peers.get(self._vault_of(part.rank))
        if peer is None:
            raise SnapshotMissing(f"rank {part.rank} is of another group now")
        if begin < end:
            await peer.pull(SnapshotKey(part.rank, page.step), part.header, pieces(begin, end), page.folds[part.rank], limited=True)

    # ------------------------------------------------------------------ putting together

    async def rebuild(self, wanted: Fetch, berth: Berth) -> None:
        """Put the lost snapshot together, check it, seal it. Raises as `Tier.get`."""
        assert wanted.rebuild is not None, "asked for where there is something to rebuild from"
        sources, key = wanted.rebuild, SnapshotKey(wanted.rank, wanted.step)
        peers = {address: self._dial(address) for address in {a for a, _ in sources.stripes} | {a for _, a in sources.others}}
        begun = time.monotonic()
        try:
            kept = [await _content(peers[address], SnapshotKey(rank, key.step)) for address, rank in sources.stripes]
            header = _header_of(key, [content for _, content in kept])
            body = await asyncio.to_thread(berth.receive, header)
            await self._lane.run(lambda: _clear(body), deadline_s=_deadline_s(len(body)))
            lock = threading.Lock()
            for number, (parity_header, content) in enumerate(kept):
                begin, end = span(header, len(kept), number)
                target = body[begin:end]
                address, rank = sources.stripes[number]
                at = payload_place(parity_header)
                pulls = [(peers[address], SnapshotKey(rank, key.step), parity_header, at, at + len(target))]
                where = dict(sources.others)
                for part in content.parts:
                    if part.rank != key.rank:
                        if part.rank not in where:
                            raise SnapshotMissing(f"{key}: nobody is named for rank {part.rank}, which is in the parity at {address}")
                        first, last = span(part.header, len(kept), part.number)
                        other = SnapshotKey(part.rank, key.step)
                        pulls.append((peers[where[part.rank]], other, part.header, first, min(last, first + len(target))))
                await _all(
                    peer.pull(of, head, pieces(first, last), Fold(target[: last - first], lock, transport=self._transport))
                    for peer, of, head, first, last in pulls
                    if first < last
                )
            await asyncio.to_thread(berth.accept, rank=key.rank, step=key.step)
        finally:
            for peer in peers.values():
                peer.close()
        parts, taken = len(sources.stripes) + len(sources.others), time.monotonic() - begun
        log.info("%s was put together from parity: %d bytes out of %d places in %.3f s", key, len(body), parts, taken)


async def _content(peer: Peer, key: SnapshotKey) -> tuple[bytes, Content]:
    header, head = await peer.head(key)
    return header, parity.content_of(header, head, f"{key} at {peer.address}")


def _header_of(key: SnapshotKey, kept: list[Content]) -> bytes:
    """Of the snapshot that is to be put together. Raises SnapshotMissing if these are not all of its stripes."""
    headers = set()
    for number, content in enumerate(kept):
        found = {part.header for part in content.parts if (part.rank, part.number) == (key.rank, number)}
        if content.stripes != len(kept) or len(found) != 1:
            raise SnapshotMissing(f"{key}: stripe {number} of {len(kept)} is not in the parity that was named for it")
        headers |= found
    if len(headers) != 1:
        raise SnapshotMissing(f"{key}: its stripes are of {len(headers)} snapshots")
    return headers.pop()


def _read(slot: Slot, rank: int, step: int) -> Content | None:
    try:
        return parity.decode(slot.read(rank=rank, step=step, verify=False).own, slot.where)
    except CheckpointError as error:
        log.warning("parity is not used: %s", error)
        return None


async def _all(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """All at once; when this returns or raises none of it is under way. Raises the first error."""
    try:
        async with asyncio.TaskGroup() as group:
            for one in work:
                group.create_task(one)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


def _clear(view: memoryview) -> None:
    step = 4 << 20
    zeros = bytes(step)
    for start in range(0, len(view), step):
        part = view[start : start + step]
        part[:] = zeros[: len(part)]


def _deadline_s(num_bytes: int) -> float:
    return COPY_S + num_bytes / COPY_BYTES_S
