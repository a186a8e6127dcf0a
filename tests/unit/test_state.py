"""What is tracked is taken and put back bit for bit, and what cannot be is refused by name."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim.swa_utils import AveragedModel

from resilient.checkpoint import capture
from resilient.errors import CheckpointError, SnapshotMismatch, UsageError
from resilient.train import twins
from resilient.train.item import item_of
from resilient.train.state import Tracked


def build(seed: int, steps: int) -> tuple[Tracked, nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    opt = torch.optim.AdamW(model.parameters(), lr=0.1)
    sched = torch.optim.lr_scheduler.StepLR(opt, 2, 0.5)
    tracked = Tracked()
    tracked.add("model", model)
    tracked.add("opt", opt)
    tracked.add("sched", sched)
    for _ in range(steps):
        model(torch.randn(5, 3)).sum().backward()
        opt.step()
        opt.zero_grad()
        sched.step()
    return tracked, model, opt, sched


def test_shared_and_own_together_make_a_twin() -> None:
    source, model, opt, sched = build(1, 5)
    payload = bytearray(capture.payload_bytes(source.shared()))
    capture.save(source.shared(), memoryview(payload))
    own = source.own()
    expected = random.random(), torch.rand(3)
    twin, twin_model, twin_opt, twin_sched = build(2, 0)
    twin.shape_like(source.layout()[0], "test")
    capture.load(twin.shared(), memoryview(payload))
    twin.load_own(own)
    assert source.layout() == twin.layout()
    for ours, theirs in zip(model.state_dict().values(), twin_model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert str(opt.state_dict()) == str(twin_opt.state_dict())
    assert sched.state_dict() == twin_sched.state_dict()
    assert (random.random(), *torch.rand(3)) == (expected[0], *expected[1])


def test_optimizer_state_that_the_source_has_not_made_yet_is_dropped() -> None:
    source, *_ = build(1, 0)
    twin, _, opt, _ = build(1, 3)
    twin.shape_like(source.layout()[0], "test")
    assert not opt.state
    assert twin.layout() == source.layout()


def test_priming_changes_nothing_but_the_optimizers_state() -> None:
    tracked, model, opt, _ = build(1, 0)
    before = [p.clone() for p in model.parameters()]
    tracked.prime()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert len(opt.state) == 6
    assert opt.param_groups[0]["lr"] == 0.1


def test_expected_bytes_foretell_the_optimizer() -> None:
    tracked, *_ = build(1, 0)
    foretold = tracked.expected_bytes()
    tracked, *_ = build(1, 1)
    assert foretold >= capture.payload_bytes(tracked.shared()) > foretold / 2


def test_version_counters_see_a_change_outside_of_a_gate() -> None:
    tracked, model, *_ = build(1, 1)
    before = tracked.versions()
    model(torch.randn(5, 3)).sum().backward()
    assert tracked.versions() == before
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    assert tracked.versions() != before


@pytest.mark.parametrize(("norm", "alike"), [(nn.BatchNorm1d, False), (nn.LayerNorm, True)])
def test_an_average_of_own_statistics_is_no_replica(norm: type[nn.Module], *, alike: bool) -> None:
    """Every rank's BatchNorm has seen other samples, and its average is made of that."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        tracked, model = Tracked(), nn.Sequential(nn.Linear(3, 4), norm(4))
        tracked.add("model", nn.parallel.DistributedDataParallel(model))
        assert twins._all_inside(tracked)
        tracked.add("average", AveragedModel(model))
        assert twins._all_inside(tracked) == alike
    finally:
        dist.destroy_process_group()


def test_version_counters_see_a_change_of_a_distributed_tensor() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        param = nn.Parameter(distribute_tensor(torch.randn(6, 4), mesh, [Shard(0)]))
        item = item_of("weight", param)
        before = item.version
        with torch.no_grad():
            param.mul_(2)
        assert (between := item.version) > before
        item.local.mul_(2)
        assert item.version > between
    finally:
        dist.destroy_process_group()


def test_another_models_layout_is_refused_by_its_first_difference() -> None:
    source, *_ = build(1, 1)
    other = Tracked()
    other.add("model", nn.Sequential(nn.Linear(3, 5)))
    with pytest.raises(SnapshotMismatch, match=r"model.0.weight float32 \[5, 3\] of \[5, 3\] expected, model.0.weight float32 \[4, 3\]"):
        other.shape_like(source.layout()[0], "test")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (
            lambda m: torch.optim.AdamW(m.parameters(), amsgrad=True),
            r"test: opt.state.model.0.weight.max_exp_avg_sq expected, which is not in it",
        ),
        (lambda m: torch.optim.SGD(m.parameters()), r"test: opt.state.model.0.weight.exp_avg found, which is not tracked here"),
        (lambda m: (m.append(nn.Linear(2, 2)), torch.optim.AdamW(m.parameters()))[1], r"test: model.3.weight expected, which is not in it"),
        (lambda m: (m.__delitem__(2), torch.optim.AdamW(m.parameters()))[1], r"test: model.2.weight found, which is not tracked here"),
        (
            lambda m: (m.insert(0, m.pop(2)), torch.optim.AdamW(m.parameters()))[1],
            r"test: model.0.weight float32 \[2, 4\] of \[2, 4\] expected",
        ),
    ],
)
def test_the_first_that_does_not_fit_is_named(make, why) -> None:
    source, *_ = build(1, 1)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    other = Tracked()
    other.add("model", model)
    other.add("opt", make(model))
    with pytest.raises(SnapshotMismatch, match=why):
        other.shape_like(source.layout()[0], "test")


def test_what_has_no_state_dict_cannot_be_tracked() -> None:
    with pytest.raises(
        UsageError, match=r"track\(loader=...\): an object with state_dict\(\) and load_state_dict\(\) expected, list found"
    ):
        Tracked().add("loader", [])


def test_a_generator_is_tracked_under_any_name() -> None:
    tracked, *_ = build(1, 1)
    generator = torch.Generator().manual_seed(3)
    tracked.add("rng", generator)
    own = tracked.own()
    expected = torch.rand(2, generator=generator)
    tracked.load_own(own)
    assert torch.equal(torch.rand(2, generator=generator), expected)


def test_optimizers_that_cannot_be_tried_out_are_given_room_all_the_same() -> None:
    model = nn.Linear(8, 8)
    tracked = Tracked()
    tracked.add("model", model)
    tracked.add("opt", torch.optim.LBFGS(model.parameters()))
    assert tracked.expected_bytes() >= 3 * sum(p.numel() * 4 for p in model.parameters())


def test_a_parameter_group_added_later_is_named() -> None:
    tracked, _, opt, _ = build(1, 1)
    own = tracked.own()
    opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(SnapshotMismatch, match="own state of AdamW: 2 parameter groups expected, 1 found"):
        tracked.load_own(own)


def test_gradients_of_zero_and_no_gradients_are_not_the_same() -> None:
    tracked, model, *_ = build(1, 0)
    weight, *others = model.parameters()
    weight.grad = torch.zeros_like(weight)
    own = tracked.own()
    weight.grad = None
    for param in others:
        param.grad = torch.ones_like(param)
    tracked.load_own(own)
    assert weight.grad is not None
    assert not weight.grad.any()
    assert all(param.grad is None for param in others)


def test_state_of_only_some_parameters_is_made_where_it_is_wanted() -> None:
    source, model, opt, _ = build(1, 0)
    model[0](torch.ones(1, 3)).sum().backward()
    opt.step()
    opt.zero_grad()
    twin, *_ = build(2, 0)
    twin.shape_like(source.layout()[0], "test")
    assert twin.layout() == source.layout()


def test_a_name_is_used_once() -> None:
    tracked = Tracked()
    tracked.add("a", nn.Linear(1, 1))
    with pytest.raises(UsageError, match="already in use"):
        tracked.add("a", nn.Linear(1, 1))


def test_own_state_that_is_not_plain_data_is_named() -> None:
    tracked, _, opt, _ = build(1, 1)
    tracked.add("bad", torch.optim.lr_scheduler.LambdaLR(opt, _Callable()))
    with pytest.raises(CheckpointError, match="bad"):
        tracked.own()


class _Callable:
    """LambdaLR saves the attributes of a callable object, here a function."""

    def __init__(self) -> None:
        self.inner = len

    def __call__(self, _epoch: int) -> float:
        return 1.0


def test_tensors_that_the_program_replaced_are_taken_anew() -> None:
    """An optimizer that writes `state["m"] = ...` instead of `m.copy_(...)`, and `param.data = ...`."""
    source, model, opt, _ = build(1, 2)
    before, layout = source.shared(), source.layout()
    assert source.layout() is layout
    assert source.shared() is before
    weight = next(model.parameters())
    opt.state[weight]["exp_avg"] = opt.state[weight]["exp_avg"] + 1
    weight.data = weight.data * 2
    assert source.layout() == layout
    payload = bytearray(capture.payload_bytes(source.shared()))
    capture.save(source.shared(), memoryview(payload))
    twin, twin_model, twin_opt, _ = build(2, 1)
    twin.shape_like(layout[0], "test")
    capture.load(twin.shared(), memoryview(payload))
    other = next(twin_model.parameters())
    assert torch.equal(other, weight)
    assert torch.equal(twin_opt.state[other]["exp_avg"], opt.state[weight]["exp_avg"])


def test_a_value_that_an_optimizer_adds_later_is_part_of_the_layout() -> None:
    source, model, opt, _ = build(1, 1)
    _, digest = source.layout()
    opt.state[next(model.parameters())]["more"] = torch.zeros(3)
    assert source.layout()[1] != digest
    assert any(item.key.endswith("0.weight.more") for item in source.shared())
