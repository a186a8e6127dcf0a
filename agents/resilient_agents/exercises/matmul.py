"""Matmul: products of matrices whose every correct result is known to the last bit, and how fast they come.

Think of a cashier who is given a sum whose answer you know, again and again, and is timed.

Contract: the matrices hold small integers, so few and so small that every partial sum, in whatever order, is an integer that the format
holds exactly (float32: up to 2**24, float16: 2**11, bfloat16: 2**8; that is checked, not hoped). So blocking, threads, tensor cores and
TF32 must all give the same bits as integer arithmetic does. Those are not asked for the whole product, which would take a minute, but for
C @ x == A @ (B @ x) with a random integer vector x: a wrong element of C escapes with a chance of one in a million
(Freivalds), and the row that is wrong is named. Each product is then repeated, on CPU with one thread and with all, and must be equal.
Rejected: a tolerance beside a float64 product (a flipped low bit passes, and that is how silent corruption looks).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, Final

import torch

EXACT: Final = {torch.float32: 1 << 24, torch.float16: 1 << 11, torch.bfloat16: 1 << 8}
LARGEST: Final = 127  # so that TF32 holds it as well
FILLED: Final = 0.7  # of a row's places, where all would be too many; six sigma from the limit
_VECTOR_MAX: Final = 1 << 20

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def run(device: str, sizes: dict[str, int], repeats: int, seconds: float) -> dict[str, dict[str, Any]]:
    """sizes: format -> rows of its matrices. Gives for each format wrong: what was, "" = nothing; tflops, the best; products."""
    return {dtype: measure(torch.matmul, device, dtype, size, repeats, seconds) for dtype, size in sizes.items()}


def measure(product: Product, where: str, format_: str, size: int, repeats: int, seconds: float) -> dict[str, Any]:
    """One format, with any way to multiply."""
    device, dtype = torch.device(where), getattr(torch, format_)
    sys.stderr.write(f"{where}: {format_}\n")  # what is told if this is the end
    left, right = matrices(size, dtype, torch.Generator().manual_seed(size))
    a, b = left.to(device, dtype), right.to(device, dtype)
    usual = torch.get_num_threads()
    first = product(a, b)
    wrong = difference(left, right, first.cpu())
    count, spent, best = 0, 0.0, float("inf")
    while not wrong and (count < repeats or spent < seconds):
        torch.set_num_threads(1 if device.type == "cpu" and count == 0 else usual)
        _wait(device)
        began = time.perf_counter()
        again = product(a, b)
        _wait(device)
        took = time.perf_counter() - began
        count, spent = count + 1, spent + took
        best = min(best, took) if count > 1 else best  # the first one is single-threaded on CPU, and warms up a GPU
        if not torch.equal(first, again):
            wrong = f"product {count + 1} of the same matrices differs from the first in {int((first != again).sum())} elements"
    return {"wrong": wrong, "tflops": 0.0 if best == float("inf") else 2 * size**3 / best / 1e12, "products": count + 1}


def matrices(size: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Two of integers, int64, such that no partial sum of their product leaves what `dtype` holds exactly."""
    limit = EXACT[dtype]
    largest = max(1, min(LARGEST, int((limit / size) ** 0.5)))
    left, right = (torch.randint(-largest, largest + 1, (size, size), generator=generator) for _ in range(2))
    if size > (most := int(FILLED * limit)):
        left *= torch.rand((size, size), generator=generator) < most / size
    bound = int(left.abs().sum(1).max() * right.abs().max())
    assert bound <= limit, f"partial sums up to {limit} expected, up to {bound} found"
    return left, right


def difference(left: torch.Tensor, right: torch.Tensor, found: torch.Tensor) -> str:
    """What is wrong with the product, "" = nothing."""
    rounded = found.to(torch.float64)
    whole = rounded.round()
    strange = ((whole != rounded) | ~(rounded.abs() < 2.0**31)).any(1).nonzero().flatten().tolist()  # NaN is neither
    if strange:
        return f"{len(strange)} of {len(whole)} rows of a product of integers hold something that is none, row {strange[0]} first"
    x = torch.randint(1, _VECTOR_MAX, (left.shape[1],), generator=torch.Generator().manual_seed(1))
    wrong = (whole.to(torch.int64) @ x) != (left @ (right @ x))
    rows = wrong.nonzero().flatten().tolist()
    return f"{len(rows)} of {len(wrong)} rows differ from integer arithmetic, row {rows[0]} first" if rows else ""


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
