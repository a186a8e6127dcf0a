"""Buffers come back bit for bit whatever their strides, and those of another module are refused by name before one is touched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resilient.checkpoint import capture
from resilient.errors import CheckpointError, SnapshotMismatch, UsageError
from resilient.train.state import Tracked

ROWS = torch.arange(12.0).view(3, 4)
ODD = {
    "expanded": lambda: ROWS[:, :1].clone().expand(3, 4),
    "expanded twice": lambda: torch.ones(1).expand(2, 3, 1),
    "a step of two": lambda: ROWS.clone()[::2, ::3],
    "upside down": lambda: ROWS.clone().t(),
    "conjugate": lambda: torch.complex(ROWS, ROWS + 1).conj(),
    "negative": lambda: torch.complex(ROWS, ROWS + 1).conj().imag,
    "nothing": lambda: torch.empty(0, 3),
    "a number": lambda: torch.tensor(1.5),
    "bool": lambda: ROWS > 5,
    "float8": lambda: ROWS.to(torch.float8_e4m3fn).t(),
}


def module(**buffers: torch.Tensor | None) -> nn.Module:
    made = nn.Module()
    for name, buffer in buffers.items():
        made.register_buffer(name, buffer)
    return made


def tracked(made: nn.Module) -> Tracked:
    found = Tracked()
    found.add("model", made)
    return found


def bits(tensor: torch.Tensor) -> bytes:
    return capture.as_bytes(tensor).numpy().tobytes()


@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_every_memory_comes_back(make) -> None:
    """Expanded and conjugate ones could be sealed and not put back, or not be sealed at all."""
    expected, source, target = bits(make()), module(b=make()), module(b=make())
    source.p, target.p = (nn.Parameter(make(), requires_grad=False) for _ in range(2))
    one, other = tracked(source), tracked(target)
    payload = memoryview(bytearray(capture.payload_bytes(one.shared())))
    capture.save(one.shared(), payload)
    own = one.own()
    with torch.no_grad():
        for tensor in (target.p, target.b):
            capture.fill(tensor, torch.zeros_like(tensor))
    other.load_own(own)
    capture.load(other.shared(), payload)
    assert (bits(target.b), bits(target.p)) == (expected, expected)


@pytest.mark.parametrize(
    ("there", "here", "why"),
    [
        ({"a": ROWS}, {"b": ROWS}, "the buffer model.b expected, none found"),
        ({"a": ROWS}, {"a": ROWS, "b": ROWS}, "the buffer model.b expected, none found"),
        ({"a": torch.ones(1)}, {"a": torch.zeros(4)}, r"model.a: float32 \[4\] expected, float32 \[1\] found"),
        ({"a": torch.ones(4)}, {"a": torch.zeros(4, dtype=torch.int32)}, r"model.a: int32 \[4\] expected, float32 \[4\] found"),
    ],
)
def test_another_modules_buffers_are_refused(there, here, why) -> None:
    """Of one element they were spread over all, of another dtype rounded, and what was too many was left out: without a word."""
    own, target = tracked(module(**there)).own(), module(**{name: buffer.clone() for name, buffer in here.items()})
    with pytest.raises(SnapshotMismatch, match=why):
        tracked(target).load_own(own)
    assert all(torch.equal(buffer, here[name]) for name, buffer in target.named_buffers())


def test_a_buffer_that_is_made_later() -> None:
    """A step that is undone takes it away again; a newcomer, which has not made its own yet, is given it."""
    source = module(late=None)
    ours = tracked(source)
    before = ours.own()
    source.late = ROWS.clone()
    after = ours.own()
    ours.load_own(before)
    assert source.late is None
    newcomer = module(late=None)
    tracked(newcomer).load_own(after)
    assert torch.equal(newcomer.late, ROWS)
    assert list(newcomer.state_dict()) == ["late"]


def test_a_buffer_that_is_registered_later(capsys) -> None:
    source = module(a=ROWS.clone())
    ours = tracked(source)
    before = ours.own()
    source.register_buffer("mask", torch.ones(2))
    after = ours.own()
    newcomer = module(a=torch.zeros(3, 4))
    theirs = tracked(newcomer)
    theirs.load_own(after)
    assert torch.equal(newcomer.mask, torch.ones(2))
    assert "the buffer model.mask is registered" in capsys.readouterr().err
    ours.load_own(before)
    assert not hasattr(source, "mask")
    ours.load_own(after)
    assert torch.equal(source.mask, torch.ones(2))
    other = nn.Sequential(module(a=ROWS))
    with pytest.raises(SnapshotMismatch, match=r"the buffer model\.0\.a expected, none found"):
        tracked(other).load_own(after)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (ROWS.to_sparse, "one of layout torch.sparse_coo"),
        (lambda: ROWS.to("meta"), "one on the meta device"),
        (lambda: ROWS.view(torch.uint8).view(torch.complex32), "complex32"),
        (lambda: nn.LazyLinear(3).weight, "one that a lazy module has not made yet"),
    ],
)
def test_what_has_no_memory_to_be_copied_is_refused_by_name(make, why) -> None:
    made = nn.Module()
    made.p = made_ if isinstance(made_ := make(), nn.Parameter) else nn.Parameter(made_, requires_grad=False)
    with pytest.raises(UsageError, match=rf"model.p: .* expected, {why} found"):
        tracked(made).shared()
    if "lazy" not in why and "complex" not in why:
        with pytest.raises(CheckpointError, match=r"model\.b"):
            tracked(module(b=make())).own()
