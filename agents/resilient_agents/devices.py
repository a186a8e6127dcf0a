"""Devices: which GPU of the machine is which worker's.

Think of seats and coats: the machine numbers its hooks (PCI), the driver numbers the coats on them (gpu:N), and each guest was told at the
door which coats are his (CUDA_VISIBLE_DEVICES), in his own order. A fault names a hook; whose coat hangs there is asked here.

Contract: pure functions of what they are given, but for `present`, which reads what the kernel module shows (no driver is asked).
`visible` says what a process sees, as CUDA does: an order of its own, cut off at the first entry that is not there; "" and "-1" hide all,
and an unset variable shows all. `local_rank` names the worker that uses a device, or None where that cannot be told (then nobody is
blamed); `seats` says the same of all devices at once. Devices are written as in `Finding.device`. One worker per GPU is assumed as
torchrun's scripts do it (`cuda.set_device(local_rank)`), or one GPU shown to each worker. Rejected: asking NVML for the processes on a
GPU: in a container it tells the numbers of another pid name space.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

_PCI = re.compile(r"(?:(?P<domain>[0-9a-fA-F]{4,8}):)?(?P<bus>[0-9a-fA-F]{2}):(?P<slot>[0-9a-fA-F]{2})(?:\.[0-7])?\Z")

NOBODY: Final = 1 << 20  # a local rank that no worker has: the device is known, and no worker uses it


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as the driver numbers it."""

    index: int  # in the driver's order, which is that of the PCI addresses
    pci: str = ""  # "0000:1a:00"; "" = not known
    uuid: str = ""  # "GPU-..."

    @property
    def device(self) -> str:
        """As findings name it."""
        return ",".join(([f"pci:{self.pci}"] if self.pci else []) + [f"gpu:{self.index}"])


def pci(address: str) -> str:
    """`00000000:1A:00.0` or `1a:00` as findings write it, "" where it is none."""
    if not (match := _PCI.match(address.strip())):
        return ""
    return f"{int(match['domain'] or '0', 16):04x}:{match['bus'].lower()}:{match['slot'].lower()}"


def visible(gpus: Sequence[Gpu], cuda_visible_devices: str | None) -> tuple[Gpu, ...]:
    """The GPUs that a process sees, in its order: the n-th is its `cuda:n`. MIG entries show the GPU that they are a part of, if told."""
    if cuda_visible_devices is None:
        return tuple(gpus)
    by_index = {gpu.index: gpu for gpu in gpus}
    seen: list[Gpu] = []
    for entry in (entry.strip() for entry in cuda_visible_devices.split(",")):
        if re.fullmatch(r"\d+", entry):
            found = by_index.get(int(entry))
        else:
            name = entry.removeprefix("MIG-").partition("/")[0]  # "MIG-GPU-<uuid>/<gi>/<ci>": the spelling that names its GPU
            named = [gpu for gpu in gpus if gpu.uuid and name.startswith("GPU-") and gpu.uuid.startswith(name)]
            found = named[0] if len(named) == 1 else None
        if found is None or (found in seen and not entry.startswith("MIG-")):
            break  # CUDA shows what stands before an entry that it cannot use
        seen.append(found)
    return tuple(seen)


def index_of(device: str, gpus: Sequence[Gpu]) -> int | None:
    """The driver's number of the GPU that `Finding.device` names; a PCI address counts more than a number."""
    parts = [part.partition(":") for part in device.split(",")]
    for name, _, value in parts:
        if name == "pci":
            return next((gpu.index for gpu in gpus if gpu.pci == value), None)
    for name, _, value in parts:
        if name in ("gpu", "npu") and value.isdecimal():
            return int(value)
    return None


def local_rank(device: str, gpus: Sequence[Gpu], shown: Mapping[int, str | None]) -> int | None:
    """Whose device that is. shown: local rank -> the CUDA_VISIBLE_DEVICES that its worker was started with, None = unset.

    A worker that sees one GPU uses that one; one that sees several uses the one of its local rank.
    """
    index = index_of(device, gpus)
    if index is None:
        return None
    return next((rank for rank, gpu in _own(gpus, shown).items() if gpu.index == index), None)


def seats(gpus: Sequence[Gpu], shown: Mapping[int, str | None]) -> dict[str, int]:
    """Every name of every device -> the local rank whose it is, or NOBODY."""
    whose = {gpu.index: rank for rank, gpu in reversed(_own(gpus, shown).items())}
    return {name: whose.get(gpu.index, NOBODY) for gpu in gpus for name in gpu.device.split(",")}


def _own(gpus: Sequence[Gpu], shown: Mapping[int, str | None]) -> dict[int, Gpu]:
    """Local rank -> its device, in the order of the ranks."""
    found = {}
    for rank, variable in sorted(shown.items()):
        seen = visible(gpus, variable)
        if variable is not None and len(seen) == 1:
            found[rank] = seen[0]
        elif rank < len(seen):
            found[rank] = seen[rank]
    return found


def present(root: str = "/") -> tuple[Gpu, ...]:
    """The NVIDIA GPUs that the kernel module has and that this name space may use, numbered as the driver numbers them.

    A container sees only its own: it has no /dev/nvidiaN of the others.
    """
    root = root.rstrip("/")
    directory = f"{root}/proc/driver/nvidia/gpus"
    found: list[Gpu] = []
    for name in sorted(_names(directory)):
        facts = dict(_fact(line) for line in _read(f"{directory}/{name}/information").splitlines())
        if facts.get("GPU Excluded", "No") == "No" and pci(name) and os.path.exists(f"{root}/dev/nvidia{facts.get('Device Minor', '')}"):
            uuid = facts.get("GPU UUID", "")
            found.append(Gpu(index=len(found), pci=pci(name), uuid=uuid if uuid.startswith("GPU-") and "?" not in uuid else ""))
    return tuple(found)


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []  # not there, or not for us to see


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(4096)
    except OSError:
        return ""


def _fact(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name.strip(), value.strip()
