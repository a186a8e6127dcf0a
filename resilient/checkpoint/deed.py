"""Deed: whose run a heap of segments is of, so that a restarted agent finds what its predecessor left.

Think of a left-luggage office: on each heap lies a slip with the traveller's name and the day he was last seen. He who comes back under
that name is given his heap; nobody else is; and a heap whose owner has not come for long enough is cleared away.

    resilient.<key>.deed       MessagePack, replaced as a whole
    resilient.<key>.minutes    frames (wire/frames.py), one `Recorded` each: what the ranks of that agent said in their set-up

Contract: `heritage` gives the heaps of dead owners that were left by the same run (id, checkpoint URL, boot of this kernel) and are not
older than they may grow, each with its claim (memory.py): of two agents that ask, one is given it. An agent that has been given a heap is
named on its slip (`agent`), so that its own successor finds the parts together. Nothing in a heap is believed because of its slip: every
header names its run, and is checked (chest.py). Ages are measured by CLOCK_BOOTTIME, which nobody sets back.
Not given: heaps in which a worker of the dead agent still writes. A worker holds a lock on its page as long as it lives (wire/page.py).
Rejected: renaming the files to the new owner's key (half of them may be renamed when he dies as well); a time of day (it is set back).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple, Self

import msgspec

from resilient.checkpoint import memory
from resilient.core.messages import NONE, Recorded
from resilient.errors import ProtocolError
from resilient.wire.frames import Decoder, encode
from resilient.wire.page import is_occupied

DYING_S: Final = 10.0  # workers are killed by the kernel in the moment in which their agent dies; a large one takes a while to be gone
_WHAT: Final = "deed"
_PAGE: Final = "page."
_MINUTES: Final = "minutes"
STAYS: Final = frozenset({_WHAT, _MINUTES, "lock"})  # of a heap, beside the chests


class Deed(msgspec.Struct, frozen=True, kw_only=True):
    """The slip."""

    run: str
    url: str  # of its checkpoints: a run of that name with another one is another run
    kernel: str  # since this one was started nothing in memory was lost
    keep_s: float  # how long it may lie here when its owner is dead
    agent: str  # the key of the agent that holds it now, or held it last
    node: str
    position: int = NONE  # of the node, among those of the run
    ranks: tuple[int, ...] = ()  # that sat here: their workers wrote into these chests, all others are copies
    seen_s: float = 0.0

    def is_of(self, other: Deed) -> bool:
        """Whether both are of one run."""
        return (self.run, self.url, self.kernel) == (other.run, other.url, other.kernel)

    def is_kept(self) -> bool:
        """Whether it is not too old, and not of another life of this machine."""
        return self.kernel == kernel() != "" and now_s() - self.seen_s <= self.keep_s

    def seen(self) -> Self:
        """The same, of this moment."""
        return msgspec.structs.replace(self, seen_s=now_s())


class Heap(NamedTuple):
    """What one dead agent left under one key; the claim is ours."""

    key: str
    deed: Deed
    claim: memory.Claim


def write(directory: Path | str, key: str, deed: Deed) -> None:
    """Put it there, or in the place of an earlier one. Raises OSError."""
    path = memory.segment_path(directory, key, _WHAT)
    fd = os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, msgspec.msgpack.encode(deed))
    finally:
        os.close(fd)
    os.replace(path + ".new", path)


def read(directory: Path | str, key: str) -> Deed | None:
    """None if there is none, or nothing that can be read."""
    try:
        with open(memory.segment_path(directory, key, _WHAT), "rb") as file:
            return msgspec.msgpack.decode(file.read(), type=Deed)
    except (OSError, msgspec.DecodeError):
        return None


def is_kept(directory: Path | str, key: str) -> bool:
    """Whether what lies there may yet be asked for by its run."""
    found = read(directory, key)
    return found is not None and found.is_kept()


def heritage(directory: Path | str, mine: Deed, *, everything: bool) -> Iterator[list[Heap]]:
    """What dead agents of our run left, one agent's heaps at a time: of our own node's name first, else of a node in our position.

    everything: we are the only node, so all of it is ours; else one agent's, for the others have heirs of their own. Blocks.
    """
    found = [(key, deed) for key in memory.owners(directory) if (deed := read(directory, key)) and deed.is_of(mine) and deed.is_kept()]
    agents = sorted({deed.agent: (deed.node != mine.node, deed.position != mine.position, deed.agent) for _, deed in found}.values())
    for *_, agent in agents:
        heaps = []
        for key, deed in found:
            if deed.agent == agent and (claim := memory.Claim.of_dead(directory, key)) is not None:
                if until_nobody_writes(directory, key):
                    heaps.append(Heap(key, deed, claim))
                else:
                    claim.release(leave=True)
        if heaps:
            yield heaps
            if not everything:
                return


def add_minute(directory: Path | str, key: str, note: Recorded) -> None:
    """Add one. Raises OSError."""
    fd = os.open(memory.segment_path(directory, key, _MINUTES), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, encode(note))
    finally:
        os.close(fd)


def minutes(directory: Path | str, keys: Iterable[str]) -> list[Recorded]:
    """All of these owners, in the order in which they were said; of a file that is damaged none."""
    found: list[Recorded] = []
    for key in keys:
        with contextlib.suppress(FileNotFoundError, ProtocolError):
            found += Decoder(Recorded).feed(Path(memory.segment_path(directory, key, _MINUTES)).read_bytes())
    return found


def forget_minutes(directory: Path | str, keys: Iterable[str]) -> None:
    """They do not count any more."""
    for key in keys:
        memory.remove(memory.segment_path(directory, key, _MINUTES))


def until_nobody_writes(directory: Path | str, key: str) -> bool:
    """Wait for the end of the workers whose agent is dead; whether all are gone."""
    pages = [memory.segment_path(directory, key, what) for what in memory.segments(directory, key) if what.startswith(_PAGE)]
    until = time.monotonic() + DYING_S
    while any(is_occupied(page) for page in pages):
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def now_s() -> float:
    """Since this kernel was started, sleep included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def kernel() -> str:
    """Names this boot of the kernel; "" where that is not told: there nothing is handed down."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
