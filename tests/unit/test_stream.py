"""The streaming copy copies every byte asked for and none besides, wherever the ends lie; a wheel has it, or does without."""

from __future__ import annotations

import ctypes
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient.checkpoint import stream

ROOM = 9000
EDGE = 256


@given(
    at=st.integers(0, 130),
    source_at=st.integers(0, 130),
    count=st.one_of(st.integers(0, 300), st.integers(0, ROOM)),
    seed=st.binary(min_size=8, max_size=8),
)
def test_every_byte_and_none_besides(at: int, source_at: int, count: int, seed: bytes) -> None:
    data = (seed * (ROOM // 8 + 64))[: ROOM + 2 * EDGE]
    source = ctypes.create_string_buffer(data, len(data))
    target = ctypes.create_string_buffer(b"\xa5" * (ROOM + 2 * EDGE), ROOM + 2 * EDGE)
    stream.copy(ctypes.addressof(target) + at, ctypes.addressof(source) + source_at, count)
    assert target.raw == b"\xa5" * at + data[source_at : source_at + count] + b"\xa5" * (ROOM + 2 * EDGE - at - count)


def test_what_lies_behind_the_end_is_not_read() -> None:
    """The prefetch goes past it; there is no memory."""
    page = os.sysconf("SC_PAGESIZE")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    memory = libc.mmap(None, 2 * page, 3, 0x22, -1, 0)  # read and write; private, anonymous
    assert memory not in (None, ctypes.c_void_p(-1).value)
    try:
        assert libc.munmap(memory + page, page) == 0
        ctypes.memset(memory, 7, page)
        target = ctypes.create_string_buffer(page)
        stream.copy(ctypes.addressof(target), memory, page)
        assert target.raw == b"\7" * page
    finally:
        libc.munmap(memory, page)


@pytest.mark.long
@pytest.mark.parametrize("compiler", ["cc", "no-such-compiler"])
def test_a_wheel_has_it_or_does_without(tmp_path: pathlib.Path, compiler: str) -> None:
    """As pip builds it; needs the package index for hatchling."""
    if shutil.which("cc") is None or platform.machine() != "x86_64":
        pytest.skip("no C compiler, or another processor")
    root = pathlib.Path(__file__).parents[2]
    tree = tmp_path / "tree"
    shutil.copytree(root, tree, ignore=shutil.ignore_patterns(".git", ".venv*", "_stream.*", "__pycache__", "bench", "runs"))
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(tree)]
    subprocess.run(command, check=True, timeout=240, env={**os.environ, "CC": compiler})
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        there = [name for name in archive.namelist() if name.startswith("resilient/checkpoint/_stream.")]
    assert there == (["resilient/checkpoint/_stream.x86_64.so"] if compiler == "cc" else [])
    assert wheel.stem.endswith("py3-none-linux_x86_64" if compiler == "cc" else "py3-none-any")
