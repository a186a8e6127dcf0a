"""What is written without torch is read by torch as its own: tensors of every dtype, and a distributed checkpoint."""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dist_checkpoint
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

from resilient.checkpoint.dcp import Chunk, Tensor, Where, metadata
from resilient.checkpoint.layout import ALIGN, ITEMSIZES
from resilient.checkpoint.pickling import encode
from resilient.checkpoint.torchfile import STORAGES, cover

SHAPES = [(), (0,), (3,), (2, 3, 5), (100, 17)]


def raw_of(dtype, count):
    """Random bytes that are elements of this dtype."""
    top = 2 if dtype == "bool" else 256
    return torch.randint(0, top, (count * ITEMSIZES[dtype],), dtype=torch.uint8)


@pytest.mark.parametrize("dtype", STORAGES)
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_reads_every_dtype(dtype, shape):
    raw = raw_of(dtype, math.prod(shape))
    data = raw.numpy().tobytes()
    front, back, num_bytes = cover(dtype, shape, crc32=zlib.crc32(data))
    assert num_bytes == len(data)
    assert len(front) % ALIGN == 0
    file = io.BytesIO(front + data + back)
    found = torch.load(file, weights_only=True)
    assert (found.dtype, found.shape) == (getattr(torch, dtype), torch.Size(shape))
    assert torch.equal(found.reshape(-1).view(torch.uint8), raw) or not data
    assert zipfile.ZipFile(file).testzip() is None, "other tools find the checksum right"


@pytest.mark.parametrize("more", [0, 64, 4032, 60_000 // 64 * 64])
def test_the_memory_begins_where_it_is_wanted(more, tmp_path):
    raw = raw_of("float32", 6)
    shortest = len(cover("float32", (2, 3)).front)
    front, back, _ = cover("float32", (2, 3), at=shortest + more)
    assert len(front) == shortest + more
    (tmp_path / "file").write_bytes(front + raw.numpy().tobytes() + back)
    for mapped in (False, True):
        found = torch.load(tmp_path / "file", weights_only=True, mmap=mapped)
        assert torch.equal(found.reshape(-1).view(torch.uint8), raw)


@pytest.mark.parametrize("at", [1, 64, 1 << 20])
def test_a_place_where_the_memory_cannot_begin(at):
    with pytest.raises(ValueError, match=f"begins at {at}: .* expected"):
        cover("float32", (2, 3), at=at)


def test_an_unknown_dtype_is_named_with_what_is_known():
    with pytest.raises(ValueError, match="'int4': one of float32"):
        cover("int4", (2,))


def test_four_gigabytes_take_the_long_form():
    front, back, num_bytes = cover("uint8", (1 << 33,))
    assert num_bytes == 1 << 33
    assert len(front) % ALIGN == 0
    assert b"PK\x06\x06" in back
    assert b"PK\x06\x07" in back


@pytest.mark.parametrize("reader", [FileSystemReader, FsspecReader])
def test_a_distributed_checkpoint_is_read_by_a_program_that_knows_nothing_of_us(tmp_path: Path, reader):
    weight, bias = torch.randn(10, 3), torch.randn(7).bfloat16()
    with (tmp_path / "rank-0.distcp").open("wb") as out:

        def put(dtype, part, offsets):
            front, back, _ = cover(dtype, part.shape)
            begin = out.tell()
            out.write(front + part.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() + back)
            return Chunk(offsets, tuple(part.shape), Where("rank-0.distcp", begin, out.tell() - begin))

        tensors = {
            "model.weight": Tensor("float32", (10, 3), [put("float32", weight[:4], (0, 0)), put("float32", weight[4:], (4, 0))]),
            "model.bias": Tensor("bfloat16", (7,), [put("bfloat16", bias, (0,))]),
        }
    paths = {"model.weight": ("model", "weight"), "model.bias": ("model", "bias")}
    (tmp_path / ".metadata").write_bytes(metadata(tensors, {}, paths))
    state = {"model": {"weight": torch.zeros(10, 3), "bias": torch.zeros(7).bfloat16()}}
    dist_checkpoint.load(state, storage_reader=reader(str(tmp_path)), no_dist=True)
    assert torch.equal(state["model"]["weight"], weight)
    assert torch.equal(state["model"]["bias"], bias)


def test_what_is_no_plain_value_is_refused():
    with pytest.raises(TypeError, match="object found"):
        encode({"x": object()})
