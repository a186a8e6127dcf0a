"""A collective in loopback gives what it would give if every peer had sent what this rank sent."""

from __future__ import annotations

import pytest
import torch
from torch.distributed import ReduceOp

from resilient.train import loopback


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (ReduceOp.SUM, [6.0, -9.0]),
        (ReduceOp.AVG, [2.0, -3.0]),
        (ReduceOp.MIN, [2.0, -3.0]),
        (ReduceOp.MAX, [2.0, -3.0]),
        (ReduceOp.PRODUCT, [8.0, -27.0]),
    ],
)
def test_reduction_of_three_equal_inputs(op: ReduceOp, expected: list[float]) -> None:
    tensor = torch.tensor([2.0, -3.0])
    loopback.reduce_(tensor, op, 3)
    assert tensor.tolist() == expected


@pytest.mark.parametrize(("size", "expected"), [(2, [0, 0]), (3, [5, 6])])
def test_exclusive_or_cancels_in_pairs(size: int, expected: list[int]) -> None:
    tensor = torch.tensor([5, 6])
    loopback.reduce_(tensor, ReduceOp.BXOR, size)
    assert tensor.tolist() == expected


def test_gather_repeats_the_input() -> None:
    own = torch.arange(3.0)
    outputs = [torch.full((3,), float("nan")) for _ in range(4)]
    loopback.gather(outputs, own)
    assert all(torch.equal(output, own) for output in outputs)
    flat = torch.full((12,), float("nan"))
    loopback.gather_flat(flat, own, 4)
    assert torch.equal(flat, own.repeat(4))


def test_reduce_scatter_gives_the_own_chunk_n_times() -> None:
    flat = torch.arange(6.0)
    output = torch.empty(2)
    loopback.scatter_reduced_flat(output, flat, 1, 3, ReduceOp.SUM)
    assert output.tolist() == [6.0, 9.0]
    loopback.scatter_reduced(output, list(flat.split(2)), 2, ReduceOp.AVG)
    assert output.tolist() == [4.0, 5.0]


def test_exchange_pads_and_cuts_to_the_sizes_expected() -> None:
    output = torch.full((5,), float("nan"))
    loopback.exchange_flat(output, torch.arange(6.0), [1, 4], [2, 4], 0, 2)
    assert output.tolist() == [0.0, 0.0, 1.0, 0.0, 0.0]
