"""A tensor as capture packs it, for tests and benchmarks that track nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Part:
    """As capture.Part."""

    local: torch.Tensor
    key: str = ""
    steady: bool = True

    @property
    def num_bytes(self) -> int:
        return self.local.numel() * self.local.element_size()

    @property
    def version(self) -> int:
        return self.local._version
