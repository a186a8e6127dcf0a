"""Torch's own engines, each as its documentation uses it; and what all engines have in common.

An engine blocks in `save` for as long as it likes; `ready` returns when the state may change again; `turn` is called once in a step;
`wait` until nothing is under way. It notes in `safe` when each save was: on the disk where it writes one, so that a power cut would
not undo it. Who leaves his bytes in the page cache gets a thread that asks for the disk as soon as he has written them.
"""

from __future__ import annotations

import os
import threading
import time

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from training import mapped


class Engine:
    """What all of them do."""

    where = "disk"

    def __init__(self, training, folder):
        self.training, self.folder = training, folder
        self.safe = {}

    def path(self, step):
        return self.folder / f"step-{step}"

    def ready(self):
        """By default nothing is read any more when `save` has returned."""

    def turn(self):
        """By default nothing has to be looked after."""

    def close(self):
        """By default nothing is left."""

    def files(self, step):
        """Those with the tensors."""
        found = self.path(step)
        return [found] if found.is_file() else [file for file in sorted(found.rglob("*")) if not file.name.startswith(".")]


class TorchSave(Engine):
    """torch.save."""

    thread = None

    def save(self, step):
        torch.save(self.training.state(), self.path(step))
        self.thread = threading.Thread(target=self.flush, args=(step,))
        self.thread.start()

    def flush(self, step):
        flush(*self.files(step))
        self.safe[step] = time.time()

    def wait(self):
        if self.thread is not None:
            self.thread.join()

    def load(self, step):
        return torch.load(self.path(step))


class Dcp(Engine):
    """dcp.async_save as it comes: memory made anew for each save, then a thread. It calls fsync itself."""

    kind = AsyncCheckpointerType.THREAD
    stager = None
    under_way = None

    def save(self, step):
        done = dcp.async_save(
            self.training.state(), checkpoint_id=self.path(step), async_checkpointer_type=self.kind, async_stager=self.stager
        )
        self.under_way = getattr(done, "upload_completion", done)
        self.under_way.add_done_callback(lambda _: self.safe.setdefault(step, time.time()))
        return done

    def wait(self):
        if self.under_way is not None:
            self.under_way.result()

    def load(self, step):
        state = mapped(self.training.state(), torch.zeros_like)
        dcp.load(state, checkpoint_id=self.path(step))
        return state

    def close(self):
        if self.stager is not None:
            self.stager.close()


class DcpProcess(Dcp):
    """The same, written by another process."""

    kind = AsyncCheckpointerType.PROCESS


class DcpStaged(Dcp):
    """Memory that is used again, filled by a thread while the next step computes; it is waited for before weights change."""

    staged = None

    def __init__(self, training, folder):
        super().__init__(training, folder)
        shared = self.kind is AsyncCheckpointerType.PROCESS
        self.stager = DefaultStager(
            StagingOptions(use_pinned_memory=False, use_shared_memory=shared, use_async_staging=True, use_non_blocking_copy=False)
        )

    def save(self, step):
        self.staged = super().save(step).staging_completion

    def ready(self):
        if self.staged is not None:
            self.staged.result()
            self.staged = None


class DcpStagedProcess(DcpStaged):
    """The same through shared memory, written by another process."""

    kind = AsyncCheckpointerType.PROCESS


def flush(*files):
    """Until they are on the disk."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())


ENGINES = {
    "torch.save": TorchSave,
    "dcp-thread": Dcp,
    "dcp-process": DcpProcess,
    "dcp-staged": DcpStaged,
    "dcp-staged-process": DcpStagedProcess,
}
