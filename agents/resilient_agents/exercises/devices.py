"""Devices: the CUDA devices that torch sees."""

from __future__ import annotations

from typing import Any

import torch


def run() -> dict[str, Any]:
    """devices: number, device (as in Finding), name, memory in bytes; error: why there are none, "" = no reason is known."""
    if not (torch.version.cuda or torch.version.hip):  # AMD's go by the same name in torch
        return {"devices": [], "error": "this torch is built without CUDA"}
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return {"devices": [], "error": str(error).partition("\n")[0]}
    return {"devices": [_told(number) for number in range(torch.cuda.device_count())], "error": ""}


def _told(number: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(number)
    return {"number": number, "device": name(number), "name": properties.name, "memory": properties.total_memory}


def name(number: int) -> str:
    """As in Finding, with its address where torch tells it."""
    properties = torch.cuda.get_device_properties(number)
    domain, bus, device = (getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device"))
    if bus is None or device is None:
        return f"gpu:{number}"
    return f"pci:{domain or 0:04x}:{bus:02x}:{device:02x},gpu:{number}"
