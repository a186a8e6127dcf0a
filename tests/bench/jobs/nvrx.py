"""NVIDIA's resiliency extension: its asynchronous checkpoint in DCP's form, and its local checkpoint, alone and with a clique of two.

It is written for CUDA. Where there is none, it is told that there is nothing to wait for and that its small tensors live on the host.
A save is written by a forked process, so that what it reads stays as it was; tensors of the host are therefore not copied first. It is
finalized at the end of the step in which all ranks have written.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from engines import Engine
from nvidia_resiliency_ext.checkpointing.async_ckpt.core import AsyncCallsQueue, AsyncRequest
from nvidia_resiliency_ext.checkpointing.async_ckpt.filesystem_async import FileSystemWriterAsync
from nvidia_resiliency_ext.checkpointing.async_ckpt.state_dict_saver import save_state_dict_async_finalize, save_state_dict_async_plan
from nvidia_resiliency_ext.checkpointing.local.basic_state_dict import BasicTensorAwareStateDict
from nvidia_resiliency_ext.checkpointing.local.ckpt_managers.local_manager import LocalCheckpointManager
from nvidia_resiliency_ext.checkpointing.local.replication.strategies import CliqueReplicationStrategy
from torch.distributed.checkpoint import DefaultSavePlanner
from training import RANK, WORLD, mapped

SHM = Path("/dev/shm")
FILES = 2  # a writing process each


class NvrxAsync(Engine):
    """Asynchronous, to the disk; it calls fsync itself."""

    def __init__(self, training, folder):
        super().__init__(training, folder)
        if not torch.cuda.is_available():
            torch.cuda.synchronize = lambda *_: None
            torch.cuda.current_device = lambda: torch.device("cpu")
        self.calls = AsyncCallsQueue(persistent=False)
        self.under_way = None

    def request(self, step):
        writer = FileSystemWriterAsync(self.path(step), thread_count=FILES)
        planned = save_state_dict_async_plan(self.training.state(), writer, None, 0, planner=DefaultSavePlanner())
        write, preload, arguments = writer.get_save_function_and_args()
        return AsyncRequest(write, arguments, [lambda: save_state_dict_async_finalize(*planned)], preload_fn=preload)

    def save(self, step):
        self.calls.schedule_async_request(self.request(step))
        self.under_way = step

    def turn(self, *, blocking=False):
        if self.under_way is not None and self.calls.maybe_finalize_async_calls(blocking=blocking):
            self.safe[self.under_way] = self.since(self.under_way)
            self.under_way = None

    def since(self, step):
        return time.time()

    def wait(self):
        self.turn(blocking=True)

    def load(self, step):
        state = mapped(self.training.state(), torch.zeros_like)
        dcp.load(state, checkpoint_id=self.path(step))
        return state

    def close(self):
        self.calls.close()


class OnHost(BasicTensorAwareStateDict):
    """State whose tensors are on the host and stay there."""

    def __init__(self, state):
        self.state_dict = state
        self._is_hollow = False

    def copy_tensors_to_cpu(self, non_blocking=False):
        """They are."""

    def restore_tensor_device(self, non_blocking=True):
        """They have none."""


class NvrxLocal(NvrxAsync):
    """To a directory in memory."""

    where = "own tmpfs"
    strategy = None

    def __init__(self, training, folder):
        super().__init__(training, folder)
        self.root = SHM / f"bench-nvrx-{os.environ.get('MASTER_PORT', os.getpid())}"
        self.manager = LocalCheckpointManager(self.root, "bench", self.strategy)

    def request(self, step):
        return self.manager.save(OnHost(self.training.state()), step, is_async=True)

    def files(self, step):
        return sorted((self.root / "bench").glob(f"*/iter_{step:07}_*"))

    def since(self, step):
        """When the last file got its name, which is earlier than anybody was told."""
        return max(file.stat().st_ctime for file in self.files(step))

    def load(self, step):
        self.manager.latest_iteration = -1
        assert self.manager.find_latest() == step
        return self.manager.load()[0].state_dict

    def close(self):
        super().close()
        if RANK == 0:
            shutil.rmtree(self.root)


class NvrxClique(NvrxLocal):
    """The same, and each rank keeps its partner's too: rank 0 with the middle one, and so on."""

    where = "own and partner's tmpfs"

    def __init__(self, training, folder):
        pairs = [dist.new_group([rank, rank + WORLD // 2]) for rank in range(WORLD // 2)]
        self.strategy = CliqueReplicationStrategy(pairs[RANK % (WORLD // 2)])
        super().__init__(training, folder)


ENGINES = {"nvrx-async": NvrxAsync, "nvrx-local": NvrxLocal, "nvrx-clique": NvrxClique}
