"""Wrappers: whether DDP and FSDP2 are fit for another forward after a step that broke.

Think of a theatre machine that must stand in its first position before the scene can be played again. DDP finds it by itself at the next
forward. FSDP2 needs its backward for that: after a forward without one its parameters stay gathered, and the next forward would wait for
ever. Its states are private to torch; they are only read here. Tested per torch version (tests/process).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.distributed.fsdp import FSDPModule

if TYPE_CHECKING:
    from resilient.train.state import Tracked


def settled(tracked: Tracked) -> bool:
    """Whether every FSDP2 module is sharded and idle. (Other wrappers need nothing.)"""
    for root in tracked.modules.values():
        for module in root.modules():
            if isinstance(module, FSDPModule):
                state = module._get_fsdp_state()  # noqa: SLF001  reshard() alone does not reset it, and nothing public asks
                groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # noqa: SLF001
                if any(group is not None and not group.is_sharded for group in groups):
                    return False
    return True
