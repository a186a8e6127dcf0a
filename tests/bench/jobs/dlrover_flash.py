"""DLRover's flash checkpoint: a copy in the memory of a saver process, and on disk.

The saver is forked from the training process, as it is without dlrover's own launcher. It does not call fsync.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

from engines import Engine, flush

POLL_S = 0.003
SOCKETS = Path("/tmp/ckpt_sock")  # dlrover says where

os.environ.setdefault("TORCHELASTIC_RUN_ID", f"bench-{os.getpid()}")  # names its sockets and its memory

from dlrover.trainer.torch.flash_checkpoint.ddp import DdpCheckpointer, StorageType  # noqa: E402


class FlashMemory(Engine):
    """To memory alone."""

    where = "saver's memory"

    def __init__(self, training, folder):
        super().__init__(training, folder)
        self.checkpointer = DdpCheckpointer(str(folder))

    def save(self, step):
        self.checkpointer.save_checkpoint(step, self.training.state(), str(self.path(step)), storage_type=StorageType.MEMORY)
        self.safe[step] = time.time()

    def wait(self):
        """It is safe when `save` returns."""

    def load(self, step):
        return self.checkpointer.load_checkpoint()

    def files(self, step):
        return [Path("/dev/shm") / self.checkpointer._engine._shm_handler.shared_memory.name.lstrip("/")]

    def close(self):
        self.checkpointer._engine._shm_handler.unlink()
        shutil.rmtree(SOCKETS / os.environ["TORCHELASTIC_RUN_ID"], ignore_errors=True)


class FlashDisk(FlashMemory):
    """Through memory to the disk."""

    where = "disk"
    thread = None

    def save(self, step):
        self.checkpointer.save_checkpoint(step, self.training.state(), str(self.path(step)), storage_type=StorageType.DISK)
        self.thread = threading.Thread(target=self.follow, args=(step,))
        self.thread.start()

    def follow(self, step):
        tracker = self.folder / "dlrover_latest.txt"
        while not (tracker.exists() and tracker.read_text() == str(step)):
            time.sleep(POLL_S)
        flush(self.path(step), tracker)
        self.safe[step] = time.time()

    def wait(self):
        if self.thread is not None:
            self.thread.join()

    def files(self, step):
        return [self.path(step)]

    def load(self, step):
        return self.checkpointer._engine._load_from_storage(str(self.path(step)))


ENGINES = {"dlrover-memory": FlashMemory, "dlrover-disk": FlashDisk}
