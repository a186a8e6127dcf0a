"""Errors: faults in our code, or in what a user gave us. A fault in the fleet is a `Finding`, never one of these.

Messages state subject, what was expected, what was found: `snapshot rank=3 step=1200: 4096 bytes expected, 4000 found (/dev/shm/...)`.
"""

from __future__ import annotations


class ResilientError(Exception):
    """Root of everything that this package raises on purpose."""


class ConfigError(ResilientError):
    """A flag, key or value is wrong; the message names it. `resilient-run` exits with 2."""


class UsageError(ResilientError):
    """The training script used the API in an order or with an object that cannot work."""


class GoneError(ResilientError):
    """An iterator cannot go back as far as a restore asks: this process must be replaced by one that begins anew."""


class ProtocolError(ResilientError):
    """Bytes from another process are not what was agreed; `remote` says whether the other side is at fault."""

    def __init__(self, message: str, *, remote: bool = True) -> None:
        """`message` states subject, expected, found."""
        super().__init__(message)
        self.remote = remote


class CheckpointError(ResilientError):
    """A copy of state cannot be written or used."""


class SnapshotMissing(CheckpointError):
    """There is no such snapshot."""


class SnapshotCorrupt(CheckpointError):
    """A snapshot was found and its bytes are not those that were sealed."""


class ReplicasDiffer(SnapshotCorrupt):
    """Ranks that should hold the same bytes do not; `ranks` are those in the minority, or all where there is no majority."""

    def __init__(self, message: str, ranks: frozenset[int]) -> None:
        """`message` names step, tensors and ranks."""
        super().__init__(message)
        self.ranks = ranks


class SnapshotMismatch(CheckpointError):
    """A sound snapshot, but of another run, world, rank or model."""


class TierUnavailable(CheckpointError):
    """The place where copies are kept does not answer or has no room."""


class RoundAborted(BaseException):
    """The round broke outside of a module's forward or backward.

    A BaseException, so that a user's `except Exception` cannot eat it. `with step:` and `@resilient.step` catch it and replay.
    """
