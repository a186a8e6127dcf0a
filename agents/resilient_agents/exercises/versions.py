"""Versions: of torch, and of what it was built with. No device is touched."""

from __future__ import annotations

import torch
import torch.distributed


def run() -> dict[str, str]:
    """By name; "" = not there."""
    cudnn = torch.backends.cudnn.version() if torch.version.cuda else None
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else ""
    return {
        "torch": str(torch.__version__),
        "CUDA of torch": torch.version.cuda or "",
        "HIP of torch": torch.version.hip or "",
        "cuDNN": str(cudnn or ""),
        "NCCL": nccl,
    }
