"""Files written past the page cache: what was put and what was lent come one after the other, wherever they lay."""

from __future__ import annotations

import mmap
import os
import random
import resource
import signal

import pytest

from resilient.checkpoint import local
from resilient.checkpoint.output import put


@pytest.mark.parametrize("directory", ["", "/dev/shm"], ids=["disk", "a file system without O_DIRECT"])
@pytest.mark.parametrize("seed", range(6))
def test_the_file_is_what_was_put_and_lent(tmp_path, monkeypatch, seed, directory):
    for name, count in (("BUFFER_BYTES", 16 << 10), ("_BATCH_BYTES", 64 << 10), ("_LENT_MIN", 4096), ("_VIEWS_MAX", 3)):
        monkeypatch.setattr(local, name, count)
    draw = random.Random(seed)
    memory = mmap.mmap(-1, 1 << 20)
    memory.write(draw.randbytes(1 << 20))
    lies, expected = memoryview(memory).toreadonly(), bytearray()
    path = f"{directory or tmp_path}/resilient-test-{os.getpid()}/file"
    try:
        with local.writing(path) as output:
            for _ in range(60):
                length = draw.choice([0, 1, 100, 4096, 5000, 70_000, 300_000])
                at = draw.randrange(0, (1 << 20) - length - 8192)
                if draw.random() < 0.7:
                    at += (output.position - at) % 4096  # as in the file
                view = lies[at : at + length]
                output.lend(view) if draw.random() < 0.7 else put(output, view)
                expected += view
                assert output.position == len(expected)
            output.finish()
        with open(path, "rb") as file:
            assert file.read() == expected
    finally:
        if os.path.exists(path):
            os.unlink(path)
        os.rmdir(os.path.dirname(path))


def test_what_the_disk_refuses_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "_BATCH_BYTES", 1 << 20)
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    memory = mmap.mmap(-1, 8 << 20)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"), local.writing(str(tmp_path / "there" / "file")) as output:
            output.lend(memoryview(memory))
            output.lend(memoryview(memory))
            output.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list((tmp_path / "there").iterdir()) == []
