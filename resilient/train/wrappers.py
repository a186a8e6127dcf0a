"""Wrappers: whether DDP and FSDP2 are fit for another forward after a step that broke.

Think of a theatre machine that must stand in its first position before the scene can be played again. DDP finds it by itself at the next
forward, but for its buckets, whose order after the first step is another than in it (the order of a sum is seen in its last bit). FSDP2
needs its backward for that: after a forward without one its parameters stay gathered, and the next forward would wait for ever. The
states of both are private to torch: FSDP2's are only read here, DDP's are moved as its own methods do it. Tested per torch version
(tests/process).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

    from resilient.train.state import Tracked


def replicas(tracked: Tracked) -> Iterator[DistributedDataParallel]:
    """The DDP wrappers among what is tracked."""
    return (module for root in tracked.modules.values() for module in root.modules() if isinstance(module, DistributedDataParallel))


def prefixes(modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Where a DDP wrapper puts its own `module.` into the names of parameters: those names up to there."""
    inside = ((name, path) for name, root in modules.items() for path, m in root.named_modules() if isinstance(m, DistributedDataParallel))
    return tuple(f"{name}.{path}." if path else f"{name}." for name, path in inside)


def rebuild_buckets(tracked: Tracked) -> None:
    """Let DDP do now what it would do at its next forward: put its buckets into the order of the first backward.

    That takes a broadcast, once, before the second step; a newcomer has it behind itself. Call it in loopback.
    """
    for module in replicas(tracked):
        module.reducer._rebuild_buckets()  # noqa: SLF001  forward() calls the same; it does nothing the second time


def first_buckets(tracked: Tracked) -> None:
    """Give DDP the buckets that it has in its first step: survivors may have left them, a newcomer's warm-up has.

    As DDP does it after unpickling: a new reducer, without any collective.
    """
    for module in replicas(tracked):
        module._remove_autograd_hooks()  # noqa: SLF001
        parameters, sparse = module._build_params_for_reducer()  # noqa: SLF001
        names = module._build_debug_param_to_name_mapping(parameters)  # noqa: SLF001
        module._ddp_init_helper(parameters, sparse, names, module.static_graph)  # noqa: SLF001
        if module.static_graph:
            module.static_graph = False  # else it would say that this was done already
            module._set_static_graph()  # noqa: SLF001
        for hook, state in module._comm_hooks:  # noqa: SLF001
            dist._register_comm_hook(module.reducer, state, hook)  # noqa: SLF001


def settled(tracked: Tracked) -> bool:
    """Whether every FSDP2 module is sharded and idle; other wrappers need nothing."""
    for root in tracked.modules.values():
        for module in root.modules():
            if isinstance(module, FSDPModule):
                state = module._get_fsdp_state()  # noqa: SLF001  reshard() alone does not reset it, and nothing public asks
                groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # noqa: SLF001
                if any(group is not None and not group.is_sharded for group in groups):
                    return False
    return True
