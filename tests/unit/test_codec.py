"""State without tensors: whatever goes in comes out equal and of the same type; what cannot is named."""

from __future__ import annotations

import contextlib
import math
import random
import struct
import time
from collections import Counter, OrderedDict, defaultdict, deque
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilient.checkpoint.codec import decode, encode
from resilient.errors import CheckpointError, SnapshotCorrupt

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8) | st.binary(max_size=8)
hashables = st.recursive(scalars, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3), max_leaves=4)
keys = st.recursive(scalars, lambda inner: st.tuples(inner, inner), max_leaves=4)
trees = st.recursive(
    scalars | st.complex_numbers() | st.integers(-(2**200), 2**200) | st.binary(max_size=8).map(bytearray),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | st.dictionaries(keys, inner, max_size=4).map(OrderedDict)
        | st.lists(inner, max_size=4).map(lambda items: deque(items, maxlen=5))
        | st.sets(hashables, max_size=4)
        | st.frozensets(hashables, max_size=4)
    ),
    max_leaves=12,
)


def same(one, two) -> bool:
    """Equal and of the same type all the way down; floats bit for bit, dicts in order."""
    if type(one) is not type(two):
        return False
    if isinstance(one, float):
        return struct.pack("<d", one) == struct.pack("<d", two)
    if isinstance(one, complex):
        return same(one.real, two.real) and same(one.imag, two.imag)
    if isinstance(one, dict):
        return len(one) == len(two) and all(
            same(a, b) for pair in zip(one.items(), two.items(), strict=True) for a, b in zip(*pair, strict=True)
        )
    if isinstance(one, list | tuple | deque):
        return len(one) == len(two) and getattr(one, "maxlen", 0) == getattr(two, "maxlen", 0) and all(map(same, one, two))
    if isinstance(one, set | frozenset):  # a nan is not equal to itself, so `==` will not do
        return len(one) == len(two) and all(any(same(a, b) for b in two) for a in one)
    return one == two


@settings(max_examples=200, deadline=None)
@given(tree=trees)
def test_what_goes_in_comes_out(tree):
    data = encode(tree)
    assert same(tree, decode(data))
    assert encode(decode(data)) == data


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=60))
def test_foreign_bytes_are_refused_or_are_plain(data):
    with contextlib.suppress(SnapshotCorrupt):
        decode(data)


@settings(max_examples=100, deadline=None)
@given(tree=trees, data=st.data())
def test_damaged_bytes_never_do_worse_than_an_error(tree, data):
    raw = bytearray(encode(tree))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(SnapshotCorrupt):
        decode(bytes(raw))


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        -math.inf,
        -0.0,
        5e-324,
        2**63,
        2**64,
        -(2**63) - 1,
        10**40,
        True,
        "\ud800",
        ["\ud800", 2**64],
        {"\ud800": 2**70},
        {1: "int", "1": "str", 1.5: "float", None: "none", (1, ("a",)): "tuple", b"1": "bytes"},
        {True: 1, False: 0},
        {(2**80,): 1},
        (),
        ((),),
        [()],
        {},
        set(),
        frozenset(),
        {(1, 2), "a", 3},
        {frozenset({1})},
        deque(maxlen=0),
        Counter({3: 2, 7: 1}),
        Counter({(1, 2): 3}),
        {"b": 1, "a": 2},
        OrderedDict(b=1, a=2),
        bytearray(b"abc"),
        1 - 2j,
        complex(math.nan, -0.0),
        random.Random(3).getstate(),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_single_values(value):
    assert same(value, decode(encode(value)))


def test_a_set_has_one_encoding():
    names = [f"name{i}" for i in range(50)]
    assert encode(set(names)) == encode({*names[25:], *names[:25]})


@pytest.mark.parametrize(
    "value",
    [
        np.float32(1.5),
        np.float64(math.nan),
        np.int64(-3),
        np.bool_(True),
        np.datetime64("2026-11-01"),
        np.str_("text"),
        np.arange(6).reshape(2, 3),
        np.arange(6).reshape(2, 3).T,
        np.array(3.5),
        np.zeros((0, 3), ">f4"),
        np.array(["a", "bc"]),
        np.float16([1, 2]),
        np.random.default_rng(0).bit_generator.state,
        np.random.RandomState(0).get_state(),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_numpy(value):
    def flat(x):
        if isinstance(x, np.ndarray | np.generic):
            return type(x), x.dtype, x.shape, x.tobytes()
        if isinstance(x, dict):
            return {key: flat(item) for key, item in x.items()}
        return tuple(map(flat, x)) if isinstance(x, tuple) else x

    assert flat(decode(encode(value))) == flat(value)


def test_a_decoded_array_may_be_written():
    found = decode(encode({"a": np.zeros(3)}))["a"]
    found += 1
    assert found.tolist() == [1, 1, 1]


class Point(NamedTuple):
    x: int
    y: int


class Colour(IntEnum):
    RED = 1


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        ({"scheduler": {"lr_lambdas": [lambda step: step]}}, r"^scheduler\.lr_lambdas\[0\]: a function \(.*<lambda>\) cannot be saved"),
        ({"a": [1, {"b": object()}]}, r"^a\[1\]\.b: an object of type builtins\.object cannot be saved"),
        ([Point(1, 2)], r"^\[0\]: a named tuple \(Point\) cannot be saved"),
        ({"a": {(1, 2): Colour.RED}}, r"^a\[\(1, 2\)\]: an object of type .*Colour cannot be saved"),
        (defaultdict(list), r"^state: an object of type collections\.defaultdict cannot be saved"),
        ({Colour.RED: 1}, r"^\[<Colour\.RED: 1>\]: .* cannot be a key"),
        ({frozenset(): 1}, r"cannot be a key"),
        ({"x": {1, Point(1, 2)}}, r"^x\[\d\]: a named tuple"),
        ({"opt": np.array([None])}, r"^opt: a numpy value of dtype object cannot be saved"),
        ({"cls": dict}, r"^cls: a class \(dict\)"),
        ({"when": time.struct_time(range(9))}, r"^when: a subclass of tuple|^when: a named tuple"),
    ],
)
def test_what_cannot_be_saved_is_named(tree, text):
    with pytest.raises(CheckpointError, match=text):
        encode(tree)


def test_a_tree_that_contains_itself():
    tree: dict = {}
    tree["again"] = [tree]
    with pytest.raises(CheckpointError, match=r"^again\[0\]\.again.*nested deeper than 100"):
        encode(tree)


class Foreign:
    def __init__(self, payload: bytes) -> None:
        self.payload = payload


def test_foreign_objects_pass_through_the_callers_hands():
    def leaf(x):
        return ("foreign", b"header", memoryview(x.payload)) if isinstance(x, Foreign) else None

    def back(kind, header, data):
        assert (kind, header) == ("foreign", b"header")
        return Foreign(bytes(data))

    tree = {"a": [Foreign(b"one"), (Foreign(b""), 2**70)], "plain": 1}
    found = decode(encode(tree, leaf=leaf), leaf=back)
    assert (found["a"][0].payload, found["a"][1][0].payload, found["a"][1][1], found["plain"]) == (b"one", b"", 2**70, 1)
    with pytest.raises(SnapshotCorrupt, match=r"no decoder was given .* 'foreign'"):
        decode(encode(tree, leaf=leaf))
    with pytest.raises(CheckpointError, match=r"^a\[0\]: an object of type .*Foreign"):
        encode(tree)


def test_numpy_goes_to_the_caller_first():
    found = decode(encode(np.zeros(2), leaf=lambda x: ("mine", b"", x.data)), leaf=lambda kind, header, data: (kind, len(data)))
    assert found == ("mine", 16)
