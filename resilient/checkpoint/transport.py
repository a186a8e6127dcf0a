"""Transport: how the body of a snapshot gets from one node's memory into another's.

Think of a removal firm: the customer says which room is to be emptied and which one filled, and hears of each piece when it stands in its
place. Whether it came by road or by rail is the firm's affair.

Contract: two vaults have proven each other over a TCP connection (wire/link.py) and agreed upon a haul (haul.py). Then each of the haul's
connections belongs to the transport at both ends, one thread at each, until `finish` here and what `receive` gives for it there. What a
transport has to tell its other end (queue pairs, keys of registered memory, addresses) it says on that connection; the bytes go by it
or beside it, never through Python. A piece is a tag, of a length that both ends know, and memory[begin:end]. Memory is `register`ed
before it is used; when the region is closed nothing is written there any more from elsewhere, whatever the other end does.
`receive` returns when the bytes are in their place: that is the completion. Every wait in which nothing moves ends after STALL_S with
TimeoutError; a connection that ends is EOFError or OSError; who gives up shuts the connection, from another thread, and that ends it too.
tests/contract/test_transport.py is what any transport has to pass.

`find` knows `tcp`, and whatever an installed package has registered as an entry point of the group `resilient.transports`: a callable
without arguments that gives a Transport.
Numbers: tests/bench/test_peer_wire.py.
Rejected: a transport that listens and connects itself (a second port, and a second proof of the token; libraries for RDMA bring up their
queue pairs over a TCP connection anyway); the small words over it as well (they are not what takes time).
"""

from __future__ import annotations

import importlib.metadata
import socket
from collections.abc import Callable
from typing import Final, Protocol

from resilient.errors import ConfigError

STALL_S: Final = 10.0  # without a byte
GROUP: Final = "resilient.transports"


class Region(Protocol):
    """Registered memory."""

    @property
    def memory(self) -> memoryview:
        """What was registered."""
        ...

    def close(self) -> None:
        """Nothing is read or written there by this transport any more when this returns."""
        ...


class Sender(Protocol):
    """The sending end of one connection."""

    def send(self, tag: bytes, begin: int, end: int, pace: Callable[[int], None] | None = None) -> None:
        """Bring memory[begin:end] there, under this tag. `pace(n)`: to be called before each n bytes, a part of a second's; it may wait.

        When this returns the bytes may still be on their way: the memory has to stay as it is until `finish` has returned.
        """
        ...

    def finish(self, tag: bytes) -> None:
        """A last tag, without bytes: afterwards the connection is again its owner's."""
        ...


class Receiver(Protocol):
    """The receiving end of one connection."""

    def receive(self, tag_bytes: int, place: Callable[[bytes], memoryview]) -> bytes:
        """Take one piece; its tag. `place(tag)`: where in the registered memory its bytes go; no bytes for the last tag.

        What `place` raises is raised.
        """
        ...


class Transport(Protocol):
    """A way from memory to memory. Thread-safe."""

    name: str

    def register(self, memory: memoryview) -> Region:
        """Make it known to whoever moves the bytes. Registering the same memory again costs little: a slot is sent again and again."""
        ...

    def sender(self, road: socket.socket, region: Region) -> Sender:
        """The end of this connection from which pieces of `region` go. Blocking; ends its waits."""
        ...

    def receiver(self, road: socket.socket, region: Region) -> Receiver:
        """The end at which they are set down."""
        ...


def find(name: str) -> Transport:
    """The transport of that name. Raises ConfigError that says which there are."""
    from resilient.checkpoint.tcp import Tcp  # noqa: PLC0415 - it implements what is above

    if name == Tcp.name:
        return Tcp()
    doors = {entry.name: entry for entry in importlib.metadata.entry_points(group=GROUP)}
    if name not in doors:
        known = ", ".join(sorted({Tcp.name, *doors}))
        raise ConfigError(f"transport: one of {known} expected, {name!r} found (packages register others as entry points of {GROUP!r})")
    made: Transport = doors[name].load()()
    return made
