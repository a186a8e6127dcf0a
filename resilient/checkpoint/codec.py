"""Codec: state that is not a tensor as bytes, without pickle.

Think of a customs form: a fixed list of goods may pass, each comes out as exactly what went in, and whatever is not on the list is
turned back with its name on a slip: `scheduler.lr_lambdas[0]: a function cannot be saved`.

Contract: None, bool, int of any size, float (bit for bit), str, bytes, bytearray, complex, list, tuple, dict (in order; keys str, int,
float, bool, None, bytes or tuples of these), OrderedDict, Counter, deque, set, frozenset, and numpy arrays and numbers come back equal
and of the same type. Anything else goes to the caller's `leaf`, then to CheckpointError naming the key path. A subclass is not its
parent: namedtuple, defaultdict, enum are turned back, for they could not come back as what they were.
Equal trees give equal bytes (sets are sorted by their encoding). Decoding builds values only: nothing in the bytes is ever run.

Form: MessagePack. What it lacks (tuple, set, ...) is an extension whose data is MessagePack again.
Numbers: the usual own state (a few dicts, three blobs of 5 KB, Python's RNG of 625 ints) takes about 30 us. Containers of plain
scalars are recognised by the set of their types, at C speed, and passed whole.
Rejected: pickle (runs code), JSON (no bytes, no tuples, no nan), walking every leaf in Python (200 us for the RNG alone).
"""

from __future__ import annotations

import importlib
import sys
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Any, Final

import msgspec

from resilient.errors import CheckpointError, SnapshotCorrupt

Leaf = tuple[str, bytes, Any]  # kind, header, data (bytes-like): what a foreign object is turned into
Encode = Callable[[Any], Leaf | None]  # None: not one of mine
Decode = Callable[[str, bytes, memoryview], Any]

DEPTH_MAX: Final = 100
_TUPLE, _SET, _FROZENSET, _COMPLEX, _INT, _LEAF, _ORDERED, _COUNTER, _DEQUE, _STR, _BYTEARRAY, _DICT = range(1, 13)
_SCALARS: Final = frozenset({type(None), bool, int, float, str, bytes})
_KEYS: Final = _SCALARS | {tuple}
_SEQUENCES: Final[dict[type, int]] = {list: 0, tuple: _TUPLE, set: _SET, frozenset: _FROZENSET, deque: _DEQUE}
_MAPPINGS: Final[dict[type, int]] = {dict: 0, OrderedDict: _ORDERED, Counter: _COUNTER}
_pack = msgspec.msgpack.Encoder().encode


def encode(tree: Any, *, leaf: Encode | None = None) -> bytes:
    """`tree` as bytes. `leaf` is asked about every object that is not on the list. Raises CheckpointError naming the key path."""
    try:
        try:
            return _pack(_Plain(leaf, trusting=True).value(tree, 0))
        except (OverflowError, UnicodeEncodeError):  # a huge int or a lone surrogate in a container that was passed whole
            return _pack(_Plain(leaf, trusting=False).value(tree, 0))
    except _TurnedBackError as error:
        raise CheckpointError(f"{error.path() or 'state'}: {error.reason}") from None


def decode(data: bytes | memoryview, *, leaf: Decode | None = None) -> Any:
    """The tree that `encode` was given. `leaf` is the inverse of encode's. Raises SnapshotCorrupt if `data` is not from `encode`."""

    def extension(code: int, data: memoryview) -> Any:
        if code == _LEAF:
            kind, header, rest = unpack(data)
            if kind in _NUMPY_KINDS:
                return _numpy_from(kind, header, rest)
            if leaf is None:
                raise SnapshotCorrupt(f"state: no decoder was given for a saved object of kind {kind!r}")
            return leaf(kind, header, memoryview(rest))
        if code not in _REBUILD:
            raise SnapshotCorrupt(f"state: unknown extension {code}")
        raw = code in (_STR, _BYTEARRAY, _INT)
        return _REBUILD[code](bytes(data) if raw else unpack(data))

    decoder = msgspec.msgpack.Decoder(ext_hook=extension)
    unpack = decoder.decode
    try:
        return unpack(data)
    except (msgspec.DecodeError, TypeError, ValueError, LookupError, RecursionError) as error:
        raise SnapshotCorrupt(f"state: {len(data)} bytes that are not encoded state ({error})") from error


class _TurnedBackError(Exception):
    """Something cannot be saved; the path is filled in on the way out, from the inside."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.steps: list[str] = []

    def path(self) -> str:
        return _short("".join(reversed(self.steps)).removeprefix("."), 200)


class _Plain:
    """Turns a tree into what MessagePack knows. `trusting`: containers of scalars pass whole, without a look at each."""

    def __init__(self, leaf: Encode | None, *, trusting: bool) -> None:
        self._leaf = leaf
        self._whole = _SCALARS if trusting else frozenset()

    def value(self, x: Any, depth: int) -> Any:
        kind = type(x)
        if kind in _SCALARS:
            return x if self._whole else _scalar(x)
        if depth >= DEPTH_MAX:
            raise _TurnedBackError(f"nested deeper than {DEPTH_MAX} (does it contain itself?)")
        if kind in _MAPPINGS:
            items = self._mapping(x, depth + 1)
            return _tagged(_MAPPINGS[kind] or (_DICT if type(items) is list else 0), items)
        if kind in _SEQUENCES:
            items = x if self._whole.issuperset(map(type, x)) else self._sequence(x, depth + 1)
            if kind is set or kind is frozenset:
                items = sorted(items, key=_pack)
            return _tagged(_SEQUENCES[kind], [x.maxlen, list(items)] if kind is deque else items)
        if kind is complex:
            return _tagged(_COMPLEX, (x.real, x.imag))
        if kind is bytearray:
            return msgspec.msgpack.Ext(_BYTEARRAY, bytes(x))
        found = (self._leaf(x) if self._leaf else None) or _numpy_leaf(x)
        if found is None:
            raise _TurnedBackError(f"{_describe(x)} cannot be saved; leave it out of state_dict() or turn it into plain data")
        return _tagged(_LEAF, found)

    def _sequence(self, x: Iterable[Any], depth: int) -> list[Any]:
        items = []
        for index, item in enumerate(x):
            try:
                items.append(self.value(item, depth))
            except _TurnedBackError as error:
                error.steps.append(f"[{index}]")
                raise
        return items

    def _mapping(self, x: dict[Any, Any], depth: int) -> dict[Any, Any] | list[Any]:
        """A dict, or a list of pairs where a key (tuple, huge int) is none of MessagePack's own."""
        plain_keys = self._whole.issuperset(map(type, x))
        if plain_keys and self._whole.issuperset(map(type, x.values())):
            return dict(x)
        pairs = []
        for key, item in x.items():
            try:
                pairs.append((key if plain_keys else self._key(key, depth), self.value(item, depth)))
            except _TurnedBackError as error:
                error.steps.append(f".{key}" if type(key) is str else f"[{_short(repr(key), 40)}]")
                raise
        return dict(pairs) if plain_keys else pairs

    def _key(self, key: Any, depth: int) -> Any:
        if type(key) not in _KEYS:
            raise _TurnedBackError(f"{_describe(key)} cannot be a key; str, int, float, bool, None, bytes and tuples of these can")
        if type(key) is tuple:
            for part in key:
                self._key(part, depth + 1)
        return self.value(key, depth)


def _scalar(x: Any) -> Any:
    if type(x) is int and not -(1 << 63) <= x < 1 << 64:
        return msgspec.msgpack.Ext(_INT, x.to_bytes(x.bit_length() // 8 + 1, "little", signed=True))
    if type(x) is str:
        try:
            x.encode()
        except UnicodeEncodeError:
            return msgspec.msgpack.Ext(_STR, x.encode("utf-8", "surrogatepass"))
    return x


def _tagged(code: int, x: Any) -> Any:
    return msgspec.msgpack.Ext(code, _pack(x)) if code else x


_REBUILD: Final[dict[int, Callable[[Any], Any]]] = {
    _TUPLE: tuple,
    _SET: set,
    _FROZENSET: frozenset,
    _COMPLEX: lambda pair: complex(*pair),
    _INT: lambda data: int.from_bytes(data, "little", signed=True),
    _ORDERED: OrderedDict,
    _COUNTER: lambda items: Counter(dict(items)),
    _DICT: dict,
    _DEQUE: lambda parts: deque(parts[1], parts[0]),
    _STR: lambda data: data.decode("utf-8", "surrogatepass"),
    _BYTEARRAY: bytearray,
}


# --------------------------------------------------------------------------- numpy, if the script has imported it

_NUMPY_KINDS: Final = ("numpy.array", "numpy.number")


def _numpy_leaf(x: Any) -> Leaf | None:
    numpy = sys.modules.get("numpy")
    if numpy is None or not (type(x) is numpy.ndarray or isinstance(x, numpy.generic)):
        return None
    if x.dtype.hasobject or x.dtype.fields is not None:
        raise _TurnedBackError(f"a numpy value of dtype {x.dtype} cannot be saved; only numbers, strings and times can")
    kind = _NUMPY_KINDS[0 if type(x) is numpy.ndarray else 1]
    return kind, _pack((x.dtype.str, x.shape)), x.tobytes()


def _numpy_from(kind: str, header: bytes, data: bytes) -> Any:
    numpy = importlib.import_module("numpy")  # the bytes hold a numpy value, so its reader needs numpy
    dtype, shape = msgspec.msgpack.decode(header)
    array = numpy.frombuffer(bytearray(data), dtype=dtype).reshape(shape)
    return array if kind == _NUMPY_KINDS[0] else array[()]


# --------------------------------------------------------------------------- words for people


def _describe(x: Any) -> str:
    if isinstance(x, tuple):
        return f"a named tuple ({type(x).__qualname__})" if hasattr(x, "_fields") else f"a subclass of tuple ({type(x).__qualname__})"
    if callable(x) and hasattr(x, "__qualname__"):
        return f"a {'class' if isinstance(x, type) else 'function'} ({x.__qualname__})"
    return f"an object of type {type(x).__module__}.{type(x).__qualname__}"


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
