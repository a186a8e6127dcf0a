"""Checkpoints of several ranks: shared out among twins, put together again, compressed, and read by torch as its own."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed.checkpoint as dist_checkpoint

from resilient.checkpoint import codec, disk
from resilient.checkpoint.capture import Packing
from resilient.checkpoint.disk import DiskTier
from resilient.checkpoint.layout import Layout, Row, Twins, decode
from resilient.checkpoint.movers import Movers
from resilient.checkpoint.slot import Slot
from resilient.checkpoint.snapshot import parse, slot_bytes
from resilient.checkpoint.source import Live, Whole
from resilient.checkpoint.tier import SnapshotKey
from resilient.errors import ReplicasDiffer, SnapshotCorrupt, SnapshotMismatch, SnapshotMissing

WORLD, STEP = 3, 7


class Part(NamedTuple):
    """A tensor to be packed."""

    local: torch.Tensor
    key: str = "model.w"
    steady: bool = False
    version: int = 0

    @property
    def num_bytes(self) -> int:
        return self.local.numel() * self.local.element_size()


def own_state(rank: int) -> bytes:
    """What a rank has beside its payload: settings of an optimizer, a buffer, a counter."""

    def leaf(thing):
        return ("tensor", codec.encode(["int64", [2], "cpu"]), thing.numpy().tobytes()) if isinstance(thing, torch.Tensor) else None

    tree = {
        " rng": {"python": rank},
        "model": {"bn.count": torch.tensor([4, 9])},
        "optim": {"groups": [{"lr": 0.1, "betas": (0.9, 0.99), "foreach": None}], "state": []},
        "sched": {"last_epoch": 7, "rates": [0.1, 0.2]},
    }
    return codec.encode(tree, leaf=leaf)


def state() -> dict[str, torch.Tensor]:
    """By the run's names."""
    torch.manual_seed(1)
    weight, bias, empty = torch.randn(6, 50), torch.randn(7).bfloat16(), torch.zeros(0, 3)
    found = {"model.module.weight": weight, "model.module.bias": bias, "model.module.empty": empty}
    for key in ("model.module.weight", "model.module.bias"):
        found[f"optim.state.{key}.exp_avg"] = torch.randn_like(found[key])
        found[f"optim.state.{key}.step"] = torch.tensor(7.0)
    return found


def boxes(tensors, rank: int, kind: str):
    """(key, whole tensor, offsets, this rank's box of it)."""
    for key, tensor in tensors.items():
        if kind == "sharded" and tensor.dim() and tensor.shape[0]:
            size = -(-tensor.shape[0] // WORLD)
            box = tensor[rank * size : (rank + 1) * size]
            yield key, tensor, (min(rank * size, tensor.shape[0]), *(0,) * (tensor.dim() - 1)), box
        else:
            yield key, tensor, (0,) * tensor.dim(), tensor


def slot_of(tmp_path: Path, rank: int, kind: str, tensors, world: int = WORLD, tied=None) -> Slot:
    """A sealed slot as a worker writes it."""
    parts = list(boxes(tensors, rank, kind))
    rows = tuple(Row(k, str(t.dtype).removeprefix("torch."), tuple(t.shape), offsets, tuple(box.shape)) for k, t, offsets, box in parts)
    twins = Twins(0, world) if kind == "replicated" else Twins(rank)
    layout = Layout(rows, twins, {"optim": (("model.module.weight", "model.module.bias"),)}, ("model.",), tied or {})
    data = layout.encode()
    room = sum(-(-row.num_bytes // 64) * 64 for row in rows)
    path = tmp_path / f"slot-{rank}"
    path.write_bytes(bytes(slot_bytes(len(data), len(own_state(rank)), room)))
    slot = Slot(str(path))
    view = slot.begin(run="run", rank=rank, world_size=world, round=1, layout=data, own=own_state(rank), payload_bytes=room)
    for (offset, length), (_, _, _, box) in zip(layout.places(), parts, strict=True):
        view[offset : offset + length] = box.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    slot.seal(STEP)
    return slot


@pytest.fixture(params=list(itertools.product(["replicated", "sharded"], [0, 3])), ids=lambda p: f"{p[0]}-zstd{p[1]}")
def kept(request, tmp_path):
    """(tier, the sealed bytes of every rank, all tensors)."""
    kind, level = request.param
    tensors, tier, parts, sealed = state(), DiskTier(str(tmp_path / "kept"), level=level), [], []
    for rank in range(WORLD):
        slot = slot_of(tmp_path, rank, kind, tensors)
        parts.append(tier.write(SnapshotKey(rank, STEP), Live(slot)))
        copy = memoryview(bytearray(slot.num_bytes))
        sealed.append(bytes(copy[: slot.stage(copy).num_bytes]))
        slot.close()
    tier.commit(STEP, parts, run="run")
    return tier, sealed, tensors


def test_every_rank_gets_back_what_it_sealed(kept):
    tier, sealed, _ = kept
    for rank, whole in enumerate(sealed):
        into = bytearray(b"?" * (len(whole) + 10))
        assert tier.get(SnapshotKey(rank, STEP), into) == len(whole)
        assert into[: len(whole)] == whole
    tier.verify(STEP)


def test_twins_write_each_tensor_once(kept):
    tier, sealed, tensors = kept
    whole = tier.checkpoint(STEP)
    written = [
        (described.rows[item.row].key, described.rows[item.row].offsets)
        for tail, described in map(whole.tail, range(WORLD))
        for item in tail.items
    ]
    if decode(parse(sealed[0], verify=False).layout).twins.count == WORLD:
        assert sorted(key for key, _ in written) == sorted(tensors)
    else:
        assert len(written) == WORLD * len(tensors)


def test_torch_reads_it_under_both_names(kept, tmp_path):
    _, _, tensors = kept
    here = tmp_path / "kept" / "step-00000007"
    for prefix in ("module.", ""):
        model = {f"{prefix}{name}": torch.zeros_like(tensors[f"model.module.{name}"]) for name in ("weight", "bias", "empty")}
        model["bn.count"] = torch.zeros(2, dtype=torch.int64)
        wanted = {"model": model, "sched": {"last_epoch": 0, "rates": []}}
        dist_checkpoint.load(wanted, checkpoint_id=here, no_dist=True)
        for name in ("weight", "bias", "empty"):
            assert torch.equal(model[f"{prefix}{name}"], tensors[f"model.module.{name}"])
        assert model["bn.count"].tolist() == [4, 9]
        assert wanted["sched"] == {"last_epoch": 7, "rates": [0.1, 0.2]}
    moments = {
        name: {"exp_avg": torch.zeros_like(tensors[f"model.module.{name}"]), "step": torch.tensor(0.0)} for name in ("weight", "bias")
    }
    optim = {"state": moments, "param_groups": [{"lr": 0.0, "betas": (0.0, 0.0), "foreach": True, "params": []}]}
    dist_checkpoint.load({"optim": optim}, checkpoint_id=here, no_dist=True)
    assert optim["param_groups"] == [{"lr": 0.1, "betas": (0.9, 0.99), "foreach": None, "params": ["weight", "bias"]}]
    for name, found in moments.items():
        assert torch.equal(found["exp_avg"], tensors[f"optim.state.model.module.{name}.exp_avg"])
        assert found["step"] == 7


def test_every_flipped_byte_is_found_and_the_tensor_is_named(kept, tmp_path):
    tier, sealed, _ = kept
    for rank in range(WORLD):
        path = tmp_path / "kept" / "step-00000007" / f"rank-{rank:05d}.distcp"
        good = path.read_bytes()
        for position in range(rank, len(good), 61):
            path.write_bytes(good[:position] + bytes([good[position] ^ 16]) + good[position + 1 :])
            with pytest.raises(SnapshotCorrupt, match=path.name):
                tier.verify(STEP)
            into = bytearray(len(sealed[rank]))
            with pytest.raises(SnapshotCorrupt, match=path.name):
                tier.get(SnapshotKey(rank, STEP), into)
        path.write_bytes(good)
    tier.verify(STEP)


def large() -> dict[str, torch.Tensor]:
    """With tensors that are written from where they lie, none of them at the begin of a page."""
    torch.manual_seed(2)
    sizes = {"a": 7, "b": 700_000, "c": 1_300_001, "d": 3}  # the third of more than one piece
    return {f"model.{name}": torch.randn(size) for name, size in sizes.items()}


@pytest.mark.parametrize("level", [0, 1])
def test_large_tensors_lie_in_the_file_as_in_memory(tmp_path, level):
    tensors, tier = large(), DiskTier(str(tmp_path / "kept"), level=level)
    slot = slot_of(tmp_path, 0, "replicated", tensors, world=1)
    tier.commit(STEP, [tier.write(SnapshotKey(0, STEP), Live(slot))], run="run")
    tail, described = tier.checkpoint(STEP).tail(0)
    for item, (begin, length) in zip(tail.items, described.places(), strict=True):
        if length > 1 << 20 and not level:
            assert (item.offset + item.memory_at - begin) % 4096 == 0
    copy, into = bytearray(slot.num_bytes), bytearray(slot.num_bytes)
    num_bytes = slot.stage(memoryview(copy)).num_bytes
    assert tier.get(SnapshotKey(0, STEP), into) == num_bytes
    assert into == copy
    model = {name.removeprefix("model."): torch.zeros_like(tensor) for name, tensor in tensors.items()}
    dist_checkpoint.load({"model": model}, checkpoint_id=tmp_path / "kept" / "step-00000007", no_dist=True)
    assert all(torch.equal(model[name.removeprefix("model.")], tensor) for name, tensor in tensors.items())
    path = tmp_path / "kept" / "step-00000007" / "rank-00000.distcp"
    good = path.read_bytes()
    around = [
        at + k for item in tail.items for at in (item.offset, item.offset + item.memory_at, item.offset + item.length) for k in (-1, 1)
    ]
    for position in (*around[1:], *range(1000, len(good), len(good) // 23)):
        with path.open("r+b") as file:
            file.seek(position)
            file.write(bytes([good[position] ^ 1]))
        with pytest.raises(SnapshotCorrupt, match=path.name):
            tier.verify(STEP)
        with pytest.raises(SnapshotCorrupt, match=path.name):
            tier.get(SnapshotKey(0, STEP), into)
        path.write_bytes(good)
    slot.close()


def test_a_writer_that_comes_back_meanwhile_leaves_no_file(tmp_path):
    slot, tier = slot_of(tmp_path, 0, "sharded", large()), DiskTier(str(tmp_path / "kept"))

    class Overtaken(Live):
        def view(self, begin, end):
            slot.unseal()
            self.found.payload.obj[self.found.num_bytes - 3] ^= 1
            return super().view(begin, end)

    with pytest.raises(SnapshotMissing, match="overwritten"):
        tier.write(SnapshotKey(0, STEP), Overtaken(slot))
    assert list((tmp_path / "kept" / "step-00000007").iterdir()) == []
    slot.close()


def test_a_file_of_an_older_format_is_refused_by_its_number(tmp_path):
    slot, tier = slot_of(tmp_path, 0, "sharded", state()), DiskTier(str(tmp_path / "kept"))
    part = tier.write(SnapshotKey(0, STEP), Live(slot))
    slot.close()
    with pytest.MonkeyPatch.context() as older:
        older.setattr(disk, "FORMAT", 2)
        tier.commit(STEP, [part], run="run")
    with pytest.raises(SnapshotMismatch, match=r"format 3, step 7 expected, format 2.*COMMIT\.json"):
        tier.manifest(STEP)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shares_are_even_and_whole(count):
    rows = tuple(Row(f"k{i}", "float32", (n,), (0,), (n,)) for i, n in enumerate([1000, 1, 1, 500, 500, 0, 7, 800]))
    owners = Layout(rows, Twins(4, count, 2)).owners()
    assert set(owners) <= set(range(4, 4 + 2 * count, 2))
    loads = [sum(row.num_bytes for row, owner in zip(rows, owners, strict=True) if owner == rank) for rank in Twins(4, count, 2).ranks]
    assert max(loads) <= math.ceil(sum(loads) / count) + 4000


def test_a_sealed_buffer_that_changed_is_refused(tmp_path):
    slot = slot_of(tmp_path, 0, "sharded", state())
    copy = memoryview(bytearray(slot.num_bytes))
    found = slot.stage(copy)
    copy[found.num_bytes - len(found.payload) + 3] ^= 1
    with pytest.raises(SnapshotCorrupt, match="not what was hashed"):
        DiskTier(str(tmp_path / "kept")).write(SnapshotKey(0, STEP), Whole(copy[: found.num_bytes]))
    assert not list((tmp_path / "kept").glob("step-*/rank*"))
    slot.close()


@pytest.mark.parametrize(("flipped", "named"), [([1], {1}), ([0, 1], {0, 1, 2})])
def test_replicas_that_differ_are_not_committed_and_the_minority_is_named(tmp_path, flipped, named):
    parts, tier = [], DiskTier(str(tmp_path / "kept"))
    for rank in range(WORLD):
        tensors = state()
        if rank in flipped:
            tensors["optim.state.model.module.bias.exp_avg"].view(torch.uint8)[rank] ^= 1
        slot = slot_of(tmp_path, rank, "replicated", tensors)
        parts.append(tier.write(SnapshotKey(rank, STEP), Live(slot)))
        slot.close()
    with pytest.raises(ReplicasDiffer, match=r"step 7: optim\.state\.model\.module\.bias\.exp_avg: differs on rank") as caught:
        tier.commit(STEP, parts, run="run")
    assert caught.value.ranks == named
    assert tier.steps() == ()


def test_torch_reads_flattened_settings_and_tied_weights(tmp_path):
    """As torch's state-dict functions give them: settings by parameter, one tensor under all its names."""
    tensors = {"model.module.weight": torch.randn(3, 4)}
    slot = slot_of(tmp_path, 0, "replicated", tensors, world=1, tied={"model.module.head": "model.module.weight"})
    tier = DiskTier(str(tmp_path / "kept"))
    tier.commit(STEP, [tier.write(SnapshotKey(0, STEP), Live(slot))], run="run")
    slot.close()
    optim = {"param_groups.weight.lr": 0.0, "param_groups.bias.betas": (0.0, 0.0)}
    model = {"weight": torch.zeros(3, 4), "head": torch.zeros(3, 4), "module.head": torch.zeros(3, 4)}
    dist_checkpoint.load({"optim": optim, "model": model}, checkpoint_id=tmp_path / "kept" / "step-00000007", no_dist=True)
    assert optim == {"param_groups.weight.lr": 0.1, "param_groups.bias.betas": (0.9, 0.99)}
    assert all(torch.equal(tensor, tensors["model.module.weight"]) for tensor in model.values())


def test_a_place_that_held_another_snapshot_leaves_nothing_in_the_next_one(tmp_path: Path) -> None:
    """Own state grows past a page: the payload moves, and the gaps between its tensors come to lie where tensors were."""
    tensors = [torch.full((1000 + number,), 1.5) for number in range(3)]
    parts = [Part(tensor) for tensor in tensors]
    layout = Layout(tuple(Row(f"model.{n}", "float32", (len(t),), (0,), (len(t),)) for n, t in enumerate(tensors)), Twins(0)).encode()
    packing, owns = Packing(parts, Movers(1)), [codec.encode({"losses": [0.5] * count}) for count in (10, 500)]
    path = tmp_path / "slot"
    path.write_bytes(bytes(slot_bytes(len(layout), len(owns[1]), packing.num_bytes)))
    slot, tier = Slot(str(path)), DiskTier(str(tmp_path / "kept"))
    for step, own in enumerate(owns, 1):
        view = slot.begin(run="run", rank=0, world_size=1, round=1, layout=layout, own=own, payload_bytes=packing.num_bytes)
        packing.save(view)
        slot.seal(step)
        tier.commit(step, [tier.write(SnapshotKey(0, step), Live(slot))], run="run")
        tier.get(SnapshotKey(0, step), bytearray(1 << 20))
        tier.verify(step)
    del view
    slot.close()
