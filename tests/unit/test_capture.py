"""Tensors go into a payload and come back bit for bit: of all dtypes and strides, few and many, wherever they lie meanwhile."""

from __future__ import annotations

import itertools
import os
import threading

import pytest
import torch
import torch.distributed as dist
from packed import Part
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim.swa_utils import AveragedModel

from resilient.checkpoint import capture, capture_gpu, movers
from resilient.checkpoint.capture import Packing
from resilient.checkpoint.layout import ALIGN, padded
from resilient.checkpoint.movers import Movers
from resilient.errors import SnapshotMismatch, TierUnavailable
from resilient.train.state import Tracked

DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.bool,
)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """A few kilobytes are many pieces, so that several threads have something to do."""
    monkeypatch.setattr(movers, "PIECE", 4096)
    monkeypatch.setattr(movers, "_ALONE", 8192)
    monkeypatch.setattr(capture, "SMALL", 512)


def raw(tensor):
    """Bytes in the order of the shape."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def filled(shape, dtype):
    count = torch.Size(shape).numel()
    noise = torch.randint(0, 256, (count * torch.empty(0, dtype=dtype).element_size(),), dtype=torch.uint8)
    return (noise & 1).view(torch.bool).view(shape) if dtype is torch.bool else noise.view(dtype).view(shape)  # NaNs included


def there_and_back(tensors, threads):
    """Save `tensors`, change them, load them; checks the place of each in the payload. Returns the packing."""
    packing = Packing([Part(tensor) for tensor in tensors], Movers(threads))
    payload = bytearray(b"\xee" * packing.num_bytes)
    wanted = [raw(tensor) for tensor in tensors]
    packing.save(memoryview(payload))
    at = 0
    for want in wanted:
        end, at = at + len(want), at + -(-len(want) // ALIGN) * ALIGN
        assert payload[end - len(want) : end] == want
        assert payload[end:at] == bytes(at - end), "of what was there before nothing is left"
    assert at == packing.num_bytes == len(payload)
    with torch.no_grad():
        for tensor in tensors:
            tensor.view_as(tensor).zero_() if tensor.numel() else None
    packing.load(memoryview(payload).toreadonly())
    assert [raw(tensor) for tensor in tensors] == wanted
    return packing


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_dtype_and_size(threads):
    shapes = [(), (0,), (1,), (3, 5), (0, 7), (129,), (64, 64), (2, 3, 4, 5), (70_001,)]
    there_and_back([filled(shape, dtype) for dtype in DTYPES for shape in shapes], threads)


@pytest.mark.parametrize("threads", [1, 3])
def test_other_strides_and_views(threads):
    image = torch.randn(4, 3, 16, 16).to(memory_format=torch.channels_last)
    square = torch.randn(64, 64)
    gaps = torch.randn(100, 10)[:, ::3]
    slice_ = torch.randn(100, 100)[10:90]  # contiguous, and not at the beginning of its storage
    turned = torch.randn(33, dtype=torch.complex64).conj()
    imaginary = torch.randn(40, dtype=torch.complex64).conj().imag  # the negative bit
    there_and_back([image, square.t(), gaps, slice_, turned, imaginary, torch.randn(5000)], threads)


def test_parameters_and_tensors_that_share_memory():
    weight = nn.Parameter(torch.randn(100, 50))
    there_and_back([weight.detach(), weight.detach()[10:20], weight.detach().view(-1), weight], 2)


def test_thousands_of_small_tensors():
    there_and_back([torch.randn(k % 17) for k in range(5000)], 2)


def test_nothing_at_all():
    assert there_and_back([], 2).num_bytes == 0
    assert there_and_back([torch.zeros(0), torch.zeros(3, 0)], 2).num_bytes == 0


def test_local_parts_of_distributed_tensors():
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        local = distribute_tensor(torch.randn(300, 40), mesh, [Shard(0)])._local_tensor
        there_and_back([local, torch.randn(3)], 2)
    finally:
        dist.destroy_process_group()


def test_a_tensor_may_lie_elsewhere_the_next_time():
    parts = [Part(torch.randn(40, 50)), Part(torch.randn(7)), Part(torch.randn(20, 30))]
    packing = Packing(parts, Movers(2))
    payload = bytearray(packing.num_bytes)
    packing.save(memoryview(payload))
    with torch.no_grad():
        parts[0].local.set_(torch.randn(40, 50))
        parts[1].local.set_(torch.randn(7))
        parts[2].local.set_(torch.randn(30, 20).t())  # and in another format
    packing.save(memoryview(payload))
    assert payload[:8000] == raw(parts[0].local)
    assert payload[8000 : 8000 + 28] == raw(parts[1].local)
    assert payload[8064 : 8064 + 2400] == raw(parts[2].local)


def test_a_storage_that_was_given_back_is_an_error_and_not_a_crash():
    gone = torch.randn(1000)
    packing = Packing([Part(gone)], Movers(1))
    gone.untyped_storage().resize_(0)
    with pytest.raises(SnapshotMismatch, match=r"shared tensor \[1000\]: its memory was given back"):
        packing.save(memoryview(bytearray(packing.num_bytes)))


def test_a_payload_that_is_too_short_is_refused():
    packing = Packing([Part(torch.randn(1000))], Movers(1))
    with pytest.raises(AssertionError, match="4032 bytes expected, 4000 found"):
        packing.save(memoryview(bytearray(4000)))


def test_version_counters_see_what_was_loaded():
    tensors = [torch.randn(10), torch.randn(5000), torch.randn(6, 6).t()]
    packing = Packing([Part(tensor) for tensor in tensors], Movers(2))
    payload = bytearray(packing.num_bytes)
    packing.save(memoryview(payload))
    before = [tensor._version for tensor in tensors]
    packing.load(memoryview(payload))
    assert all(tensor._version > was for tensor, was in zip(tensors, before, strict=True))


def test_threads_are_made_when_needed_once_and_by_each_process_for_itself():
    crew = Movers(3)
    parts = [Part(torch.randn(50_000)) for _ in range(4)]
    packing = Packing(parts, crew)
    payload = bytearray(packing.num_bytes)
    assert crew._pool is None
    for _ in range(20):
        packing.save(memoryview(payload))
    assert 1 <= len(crew._pool._threads) <= 2
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        again = bytearray(packing.num_bytes)
        packing.save(memoryview(again))
        os.write(write_end, bytes([again == payload]))
        os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as file:
        assert file.read() == b"\x01"
    os.waitpid(child, 0)


def test_what_a_thread_raises_is_raised_here_and_the_rest_is_copied(monkeypatch):
    source, target = bytearray(os.urandom(1 << 20)), bytearray(1 << 20)
    pieces = movers.cut((address(target), address(source), 1 << 20))
    there = threading.Barrier(2, timeout=30)
    copy, first = movers.stream.copy, []

    def failing(*move):
        if not first:
            first.append(move)
            raise MemoryError("no room for one")
        copy(*move)

    def both(pieces_left):
        there.wait()
        work(pieces_left)

    work = movers._work
    monkeypatch.setattr(movers.stream, "copy", failing)
    monkeypatch.setattr(movers, "_work", both)
    with pytest.raises(MemoryError, match="no room for one"):
        Movers(2).move([], pieces)
    missing = first[0][0] - address(target)
    assert target[:missing] == source[:missing]
    assert target[missing + 4096 :] == source[missing + 4096 :]


def test_a_thread_that_does_not_come_back_is_an_error(monkeypatch):
    go_on = threading.Event()
    caller, work = threading.current_thread(), movers._work
    monkeypatch.setattr(movers, "_PATIENCE_S", 0.0)
    monkeypatch.setattr(movers, "_PATIENCE_BYTES_S", 1 << 40)
    monkeypatch.setattr(movers, "_work", lambda pieces: work(pieces) if threading.current_thread() is caller else go_on.wait(30))
    source, target = bytearray(1 << 20), bytearray(1 << 20)
    try:
        with pytest.raises(TierUnavailable, match="1 of 1 threads did not come back"):
            Movers(2).move([], movers.cut((address(target), address(source), 1 << 20)))
    finally:
        go_on.set()


def test_cores_are_shared_with_the_ranks_beside(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(24)))
    assert [movers.threads_for(ranks) for ranks in (1, 2, 4, 24, 100)] == [8, 8, 6, 1, 1]


def address(memory):
    return torch.frombuffer(memory, dtype=torch.uint8).data_ptr()


# ---------------------------------------------------------------------- beside the program


def snapshot_of(tensors, payload):
    """What `payload` holds of each."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    places = itertools.accumulate((padded(size) for size in sizes), initial=0)
    return [bytes(payload[at : at + size]) for at, size in zip(places, sizes, strict=False)]


def test_what_may_change_is_there_at_once_and_the_rest_when_it_is_finished():
    steady, restless = torch.randn(5000), torch.randn(5000)
    known = torch.randn(300)
    parts = [Part(steady, "steady"), Part(restless, "restless", steady=False), Part(known, "known")]
    packing = Packing(parts, Movers(2), overlap=True, restless={"known"})
    payload = bytearray(packing.num_bytes)
    wanted = [raw(part.local) for part in parts]
    passage = packing.begin(memoryview(payload))
    restless.zero_()
    known.zero_()
    assert snapshot_of([steady, restless, known], payload) == [bytes(20_000), *wanted[1:]]
    thread = threading.Thread(target=passage.finish)
    thread.start()
    thread.join()
    assert snapshot_of([steady, restless, known], payload) == wanted
    assert passage.touched() == []


def test_who_does_not_wait_tears_it_and_is_found_out():
    tensors = [torch.randn(2000), torch.randn(20), torch.randn(60, 50).t(), torch.randn(7)]
    parts = [Part(tensor, f"t{i}") for i, tensor in enumerate(tensors)]
    packing = Packing(parts, Movers(2), overlap=True)
    payload = bytearray(packing.num_bytes)
    wanted = [raw(tensor) for tensor in tensors]
    passage = packing.begin(memoryview(payload))
    for tensor in tensors[:3]:
        tensor.mul_(2)
    passage.finish()
    assert [a == b for a, b in zip(snapshot_of(tensors, payload), wanted, strict=True)] == [False, False, False, True]
    assert passage.touched() == ["t0", "t1", "t2"]


def test_memory_that_is_let_go_is_held_until_it_is_copied():
    parts = [Part(torch.randn(2_000_000), "large"), Part(torch.randn(30), "small")]
    wanted = [raw(part.local) for part in parts]
    packing = Packing(parts, Movers(1), overlap=True)
    payload = bytearray(packing.num_bytes)
    passage = packing.begin(memoryview(payload))
    for part in parts:
        part.local.data = torch.zeros(part.local.shape)
    passage.finish()
    assert snapshot_of([part.local for part in parts], payload) == wanted
    assert passage.touched() == ["large", "small"]


def test_memory_that_was_exchanged_meanwhile_is_found_out():
    frozen = torch.randn(100)
    watched = capture.Watched([Part(frozen, "frozen")])
    assert watched.touched() == []
    frozen.data = torch.randn(100)
    assert watched.touched() == ["frozen"]


def test_a_program_without_a_gpu_waits_for_nothing():
    packing = Packing([Part(torch.randn(1000))], Movers(1))
    assert packing.begin(memoryview(bytearray(packing.num_bytes))) is None


def test_small_things_that_lie_side_by_side_travel_on_one_tray(monkeypatch):
    """The plan of what a GPU copies, carried out with a tray of host memory."""
    tray = torch.full((1 << 16,), 0xDD, dtype=torch.uint8)
    monkeypatch.setattr(capture_gpu, "_tray", lambda _: tray)
    shapes = [(3,), (70, 70), (0,), (5, 5), (1,), (33,), (300, 300), (2, 2), (9,), (65, 64)]
    tensors = [filled(shape, DTYPES[i % len(DTYPES)]) for i, shape in enumerate(shapes)]
    tensors[7] = torch.randn(2, 2, 2).transpose(0, 2)
    offsets = list(itertools.accumulate((padded(t.numel() * t.element_size()) for t in tensors), initial=0))
    pieces = [(tensor, offset) for tensor, offset in zip(tensors, offsets, strict=False) if tensor.numel()]
    flat = torch.full((offsets[-1],), 0xEE, dtype=torch.uint8)
    plan = capture_gpu.lots(pieces, pack=20_000, tray=24_000)
    assert [len(lot.tensors) for lot in plan] == [5, 1, 1, 2]  # up to the large one, that one, the turned one, and what follows
    assert all(lot.num_bytes <= 24_000 for lot in plan if len(lot.tensors) > 1)
    for lot in plan:
        lot.launch(flat)
    assert snapshot_of(tensors, flat.numpy().tobytes()) == [raw(tensor) for tensor in tensors]
    assert 0xDD not in flat.numpy().tobytes()[24:64]  # between the first two
    gap = capture_gpu.lots([(torch.ones(4), 0), (torch.ones(4), 128)])
    assert [lot.offset for lot in gap] == [0, 128]  # what is another's in between is not written to


def test_buffers_that_a_forward_changes_are_captured_as_they_were():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(net.parameters())
    tracked = Tracked()
    for name, thing in {"net": net, "average": AveragedModel(net), "optimizer": optimizer}.items():
        tracked.add(name, thing)
    net(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    items = tracked.shared()
    unsteady = {item.key for item in items if not item.steady}
    assert unsteady == {
        "average.n_averaged",
        *(f"average.module.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")),
    }
    packing = Packing(items, Movers(1), overlap=True)
    payload = bytearray(packing.num_bytes)
    shared, own = [raw(item.local) for item in items], tracked.own()
    passage = packing.begin(memoryview(payload))
    tracked.modules["average"](torch.randn(8, 4))
    net(torch.randn(8, 4)).sum().backward()
    assert tracked.own() != own  # which is plain bytes, taken before
    passage.finish()
    assert passage.touched() == []
    assert snapshot_of([item.local for item in items], payload) == shared
