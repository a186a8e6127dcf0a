"""Our groups under torch's names: the few private pieces of torch.distributed that this project touches, in one place.

Think of an adapter plug. `torch.distributed` keeps its bookkeeping (names, rank maps, default group); only what it would have built as a
gloo or nccl group is built as a `Group`.

Contract: `install(comm, store)` once per process; afterwards `init_process_group` has been done, and every later `new_group`,
`init_device_mesh` and `split_group` of the script makes our groups, whichever backend it names. `get_backend()` answers with the inner
group's name. Tested per torch version (tests/contract/test_group.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

if TYPE_CHECKING:
    from resilient.train.comm import Comm

NAME: Final = "resilient"


def install(comm: Comm, store: Any) -> None:
    """Make `comm`'s groups the process groups of torch.distributed. `store`: the default store scripts may ask for."""

    def create(options: Any, _backend_options: Any) -> Any:
        ranks = tuple(options.global_ranks_in_group) or tuple(range(comm.world_size))
        return comm.add(options.group_rank, ranks)

    if NAME.upper() not in dist.Backend._plugins:  # noqa: SLF001  register_backend refuses a second time
        dist.Backend.register_backend(NAME, create, extended_api=True, devices=["cpu", "cuda"])
    original = c10d._new_process_group_helper  # noqa: SLF001

    def helper(*args: Any, **kwargs: Any) -> Any:
        """As torch's, with our backend for any that was named, and the inner name in torch's books."""
        values = list(args)
        if len(values) > 3:  # (group_size, group_rank, global_ranks_in_group, backend, store, ...)
            values[3] = dist.Backend(NAME)
        else:
            kwargs["backend"] = dist.Backend(NAME)
        group, prefix_store = original(*values, **kwargs)
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            c10d._world.pg_map[group] = (comm.kind, prefix_store)  # noqa: SLF001
        return group, prefix_store

    c10d._new_process_group_helper = helper  # noqa: SLF001
    dist.init_process_group(NAME, store=store, rank=comm.rank, world_size=comm.world_size)


class OverlayStore(dist.Store):
    """A standby's default store: reads pass to the run's store, writes stay here."""

    def __init__(self, below: Any) -> None:
        """`below`: the store whose contents are seen, None for an empty one."""
        super().__init__()
        self._below, self._own = below, dist.HashStore()
        self._written: set[str] = set()

    def open(self) -> None:
        """This process is the rank from here on: it reads and writes the run's store."""
        own, self._own = self._own, self._below
        for key in self._written:  # what the one who sat here before did not come to write
            if not self._below.check([key]):
                self._below.set(key, own.get(key))

    def set(self, key: str, value: Any) -> None:
        """Kept here only."""
        self._written.add(key)
        self._own.set(key, value)

    def get(self, key: str) -> bytes:
        """Own value, else the run's."""
        if self._own.check([key]) or self._below is None:
            return bytes(self._own.get(key))
        return bytes(self._below.get(key))

    def add(self, key: str, amount: int) -> int:
        """Counts here only, from the run's value."""
        return int(self._own.add(key, amount))

    def check(self, keys: list[str]) -> bool:
        """Whether all exist, here or there."""
        return all(self._own.check([key]) or (self._below is not None and self._below.check([key])) for key in keys)

    def wait(self, keys: list[str], *timeout: Any) -> None:
        """Until all exist."""
        for key in keys:
            if not self._own.check([key]) and self._below is not None:
                self._below.wait([key], *timeout)

    def delete_key(self, key: str) -> bool:
        """Own value only."""
        return bool(self._own.delete_key(key))
