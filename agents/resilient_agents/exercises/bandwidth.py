"""Bandwidth: how fast a memory is copied, and whether the copy is one.

Contract: gigabytes of payload a second (each is read once and written once), the best of some copies; and whether the copy is equal to
the last byte. The bytes are random, so that nothing along the way can compress them.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch


def run(device: str, num_bytes: int, repeats: int) -> dict[str, Any]:
    """From `device` to itself ("cpu", "cuda:0")."""
    return copied(torch.device(device), torch.device(device), num_bytes, repeats)


def tour(ways: list[tuple[str, str]], num_bytes: int, repeats: int) -> list[dict[str, Any]]:
    """From one to the other, one way after the other; "cpu" beside a GPU is pinned memory."""
    answers = []
    for source, target in ways:
        sys.stderr.write(f"{source} to {target}\n")  # what is told if this is the end
        answers.append(copied(torch.device(source), torch.device(target), num_bytes, repeats))
    return answers


def copied(source: torch.device, target: torch.device, num_bytes: int, repeats: int) -> dict[str, Any]:
    """gb_s, and wrong: "" = equal."""
    pinned = source != target
    original = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned).random_(
        0, 256, generator=torch.Generator().manual_seed(num_bytes)
    )
    sent = original.to(source)
    got = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned) if target.type == "cpu" else torch.empty_like(sent, device=target)
    best = float("inf")
    got.fill_(0)
    for _ in range(repeats + 1):  # the first one meets memory that was never touched
        _wait(source, target)
        began = time.perf_counter()
        got.copy_(sent, non_blocking=True)
        _wait(source, target)
        best = min(best, time.perf_counter() - began)
    wrong = int((got.cpu() != original).sum())
    return {"gb_s": num_bytes / best / 1e9, "wrong": f"{wrong} of {num_bytes} bytes differ" if wrong else ""}


def _wait(*devices: torch.device) -> None:
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
