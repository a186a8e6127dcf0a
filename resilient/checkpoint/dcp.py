"""DCP: the `.metadata` of `torch.distributed.checkpoint`, written without torch.

Think of a library's card index: it says of every work in how many volumes it stands, on which shelf each, and at which page. The works do
not care who wrote the cards.

Contract: `metadata` is pure; what it gives is read by `FileSystemReader` and `FsspecReader` as their own. A tensor is given as its chunks,
each with the place of its torch file (torchfile.py). Sources:
torch/distributed/checkpoint/metadata.py and filesystem.py (the classes and their fields).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from resilient.checkpoint.pickling import Call, Global, Instance, Pairs, encode

_META: Final = "torch.distributed.checkpoint.metadata"
_SIZE: Final = Global("torch", "Size")


class Where(NamedTuple):
    """A piece of a file."""

    path: str  # below the checkpoint's directory
    offset: int
    length: int
    codec: str = ""  # what its bytes went through, as torch names it


class Chunk(NamedTuple):
    """A box of a tensor."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    where: Where


class Tensor(NamedTuple):
    """A tensor and all its boxes."""

    dtype: str
    shape: tuple[int, ...]
    chunks: Sequence[Chunk]


def metadata(tensors: Mapping[str, Tensor], objects: Mapping[str, Where], paths: Mapping[str, Sequence[str | int]]) -> bytes:
    """The file. objects: pickled values (torch.save) by name. paths: name -> the keys under which a nested state dict has it."""
    described: dict[str, Any] = {name: _tensor(tensor) for name, tensor in tensors.items()}
    described |= {name: Instance(Global(_META, "BytesStorageMetadata"), None) for name in objects}
    places = [(_index(name, c.offsets, i), _info(c.where)) for name, t in tensors.items() for i, c in enumerate(t.chunks)]
    places += [(_index(name, None, None), _info(where)) for name, where in objects.items()]
    state = {
        "state_dict_metadata": described,
        "planner_data": {name: tuple(path) for name, path in paths.items()},
        "storage_data": Pairs(places),
        "storage_meta": None,
        "version": "1.0.0",
    }
    return encode(Instance(Global(_META, "Metadata"), state))


def _tensor(tensor: Tensor) -> Instance:
    chunk = Global(_META, "ChunkStorageMetadata")
    chunks = [Instance(chunk, {"offsets": _size(c.offsets), "sizes": _size(c.shape)}) for c in tensor.chunks]
    layout = Call(Global("torch.serialization", "_get_layout"), ("torch.strided",))
    contiguous = Call(Global(_META, "_MEM_FORMAT_ENCODING"), (0,))
    properties = Instance(Global(_META, "TensorProperties"), (Global("torch", tensor.dtype), layout, False, contiguous, False))
    return Instance(Global(_META, "TensorStorageMetadata"), {"properties": properties, "size": _size(tensor.shape), "chunks": chunks})


def _index(name: str, offsets: tuple[int, ...] | None, number: int | None) -> Instance:
    state: dict[str, Any] = {"fqn": name, "index": number}
    if offsets is not None:
        state["offset"] = _size(offsets)
    return Instance(Global(_META, "MetadataIndex"), state)


def _info(where: Where) -> Instance:
    state: dict[str, Any] = {"relative_path": where.path, "offset": where.offset, "length": where.length}
    if where.codec:
        state["transform_descriptors"] = [where.codec]
    return Instance(Global("torch.distributed.checkpoint.filesystem", "_StorageInfo"), state)


def _size(numbers: tuple[int, ...]) -> Call:
    return Call(_SIZE, (tuple(numbers),))
