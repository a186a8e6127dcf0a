"""Pickling: the few pickle opcodes with which torch's classes are named without importing torch.

Think of an address on an envelope: whoever writes it need not have been in that house.

Contract: `encode(value)` gives the bytes that `pickle.load` reads; plain values, tuples, lists, dicts as themselves, and `Global` (a class
or function, found where it is read), `Call` (of one, with arguments), `Instance` (of a class, made without its constructor, then given its
state), `Pairs` (a dict whose keys are such objects). Pure; nothing here ever reads a pickle. Opcodes: Lib/pickletools.py.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple


class Global(NamedTuple):
    """Something that a module holds."""

    module: str
    name: str


class Call(NamedTuple):
    """`function(*arguments)`, when it is read."""

    function: Global
    arguments: tuple[Any, ...]


class Instance(NamedTuple):
    """An object of a class with that state: its `__dict__`, or what its `__setstate__` takes."""

    kind: Global
    state: Any


class Pairs(NamedTuple):
    """A dict whose keys are objects of the reader's."""

    items: Sequence[tuple[Any, Any]]


class Persistent(NamedTuple):
    """What the reader finds by an id of its own: torch's storages."""

    identity: tuple[Any, ...]


def encode(value: Any, *, protocol: int = 4) -> bytes:
    """The pickle of `value`, protocol 2 or 4. Raises TypeError for what is none of the above."""
    out = bytearray((0x80, protocol))
    _put(out, value, _Known(protocol))
    out += b"."
    return bytes(out)


def _put(out: bytearray, value: Any, known: _Known) -> None:
    kind = type(value)  # told apart by it, for an index has a million values
    if kind is str or kind is Global:
        _once(out, value, known)
    elif kind is int:
        _number(out, value)
    elif kind is tuple or kind is list:
        out += b"(" if kind is tuple else b"]("
        for item in value:
            _put(out, item, known)
        out += b"t" if kind is tuple else b"e"
    elif kind is Instance:
        _put(out, value.kind, known)
        out += b")\x81"
        if value.state is not None:
            _put(out, value.state, known)
            out += b"b"
    elif kind is Call:
        _put(out, value.function, known)
        _put(out, tuple(value.arguments), known)
        out += b"R"
    elif kind is dict or kind is Pairs:
        out += b"}("
        for key, item in value.items() if kind is dict else value.items:
            _put(out, key, known)
            _put(out, item, known)
        out += b"u"
    elif value is None:
        out += b"N"
    elif kind is bool:
        out += b"\x88" if value else b"\x89"
    elif kind is float:
        out += b"G" + struct.pack(">d", value)
    elif kind is Persistent:
        _put(out, value.identity, known)
        out += b"Q"
    else:
        msg = f"a plain value, Global, Call, Instance, Pairs or Persistent expected, {kind.__name__} found"
        raise TypeError(msg)


class _Known(dict[Any, int]):
    """What was named already, by its number."""

    def __init__(self, protocol: int) -> None:
        super().__init__()
        self.protocol = protocol


def _once(out: bytearray, value: str | Global, known: _Known) -> None:
    """The second time it is called by its number; protocol 2 has no short way to give one, and its pickles here are short."""
    if (number := known.get(value)) is not None:
        out += b"j" + struct.pack("<I", number)
        return
    if isinstance(value, str):
        _text(out, value)
    elif known.protocol == 2:
        out += f"c{value.module}\n{value.name}\n".encode()
    else:
        _text(out, value.module)
        _text(out, value.name)
        out += b"\x93"
    if known.protocol > 2:
        known[value] = len(known)
        out += b"\x94"


def _text(out: bytearray, text: str) -> None:
    raw = text.encode()
    out += b"X" + struct.pack("<I", len(raw)) + raw


def _number(out: bytearray, number: int) -> None:
    if -(1 << 31) <= number < 1 << 31:
        out += b"J" + struct.pack("<i", number)
        return
    raw = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    out += b"\x8a" + bytes([len(raw)]) + raw
