"""Sealed snapshots, made as a worker makes them."""

from __future__ import annotations

import uuid

from resilient.checkpoint import codec
from resilient.checkpoint.layout import Layout, Row, Twins, padded
from resilient.checkpoint.slot import Slot
from resilient.checkpoint.snapshot import slot_bytes

OWN = codec.encode({"model": {}, "counter": {"seen": 7}})


def described(payload_bytes: int, twins: Twins) -> bytes:
    """A layout of so many bytes."""
    rows = (Row("model.w", "uint8", (payload_bytes,), (0,), (payload_bytes,)),)
    return Layout(rows if payload_bytes else (), twins).encode()


def sealed(directory, rank: int, step: int, payload: bytes = b"payload", *, stamp: bool = True, world_size: int = 2) -> bytes:
    """The bytes of a sound snapshot."""
    path = directory / f"made-{uuid.uuid4()}"
    layout, room = described(len(payload), Twins(rank)), padded(len(payload))
    path.write_bytes(bytes(slot_bytes(len(layout), len(OWN), room)))
    slot = Slot(str(path))
    view = slot.begin(run="run", rank=rank, world_size=world_size, round=1, layout=layout, own=OWN, payload_bytes=room)
    view[: len(payload)] = payload
    slot.seal(step)
    if not stamp:
        return path.read_bytes()
    copy = memoryview(bytearray(slot.num_bytes))
    slot.stage(copy)
    slot.close()
    path.unlink()
    return bytes(copy)
