"""Capture on a GPU: what lay there at the boundary is what arrives, whatever the program does meanwhile (`pytest -m gpu tests/gpu`)."""

from __future__ import annotations

import itertools
import mmap
import threading

import pytest
import torch
from packed import Part
from torch import nn
from torch.optim.swa_utils import AveragedModel

from resilient.checkpoint import capture_gpu
from resilient.checkpoint.capture import Packing
from resilient.checkpoint.layout import padded
from resilient.checkpoint.movers import Movers
from resilient.train.state import Tracked

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

LATE = 200_000_000  # clock cycles: a tenth of a second, longer than any body here


@pytest.fixture
def payload():
    """Shared memory of a given size that the driver may write to; checked that it may."""
    opened = []

    def open_(num_bytes):
        memory = memoryview(mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_SHARED | mmap.MAP_POPULATE))
        registered = capture_gpu.Registered(memory)
        opened.append(registered)
        assert registered.held
        return memory

    yield open_
    torch.cuda.synchronize()
    for registered in opened:
        registered.close()


def raw(tensor):
    return tensor.detach().resolve_conj().resolve_neg().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


def there(tensors, payload):
    """What `payload` holds of each."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    places = itertools.accumulate((padded(size) for size in sizes), initial=0)
    return [bytes(payload[at : at + size]) for at, size in zip(places, sizes, strict=False)]


def delay():
    """What is captured from here on is copied late."""
    with torch.cuda.stream(capture_gpu._stream(torch.device("cuda", torch.cuda.current_device()))):
        torch.cuda._sleep(LATE)


def test_every_dtype_size_and_stride_there_and_back(payload):
    dtypes = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.int64, torch.uint8, torch.bool)
    tensors = []
    for dtype, shape in itertools.product(dtypes, [(), (0,), (1,), (129,), (64, 65), (3_000_001,)]):
        count = torch.Size(shape).numel() * torch.empty(0, dtype=dtype).element_size()
        noise = torch.randint(0, 256, (count,), dtype=torch.uint8, device="cuda")
        tensors.append(((noise & 1) if dtype is torch.bool else noise).view(dtype).view(shape))
    image = torch.randn(4, 3, 16, 16, device="cuda").to(memory_format=torch.channels_last)
    tensors += [image, torch.randn(64, 64, device="cuda").t(), torch.randn(33, dtype=torch.complex64, device="cuda").conj()]
    tensors += [torch.tensor(3.0), torch.randn(100_000)]  # of the host, as Adam's counts are
    packing = Packing([Part(tensor) for tensor in tensors], Movers(2))
    memory = payload(packing.num_bytes)
    wanted = [raw(tensor) for tensor in tensors]
    packing.save(memory)
    assert there(tensors, memory) == wanted
    for tensor in tensors:
        tensor.zero_()
    packing.load(memory)
    assert [raw(tensor) for tensor in tensors] == wanted


def test_a_training_loop_goes_on_while_it_is_captured(payload):
    torch.manual_seed(1)
    blocks = [nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU()) for _ in range(20)]
    net = nn.Sequential(*blocks, nn.Linear(512, 20_000)).cuda()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    average = AveragedModel(net)
    tracked = Tracked()
    for name, thing in {"net": net, "average": average, "optimizer": optimizer}.items():
        tracked.add(name, thing)

    def body():
        average(torch.randn(64, 512, device="cuda"))  # in training mode: its buffers move
        net(torch.randn(64, 512, device="cuda")).square().mean().backward()

    def gate():
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(net)

    body()
    gate()
    items = tracked.shared()
    packing = Packing(items, Movers(2))
    memory = payload(packing.num_bytes)
    for _ in range(10):
        wanted = [item.local.clone() for item in items]
        delay()
        passage = packing.begin(memory)
        body()
        thread = threading.Thread(target=passage.finish)  # as the thread that seals does
        thread.start()
        thread.join()
        assert passage.touched() == []
        assert there([item.local for item in items], memory) == [raw(tensor) for tensor in wanted]
        gate()


def test_who_does_not_wait_tears_it_and_is_found_out(payload):
    steady, other = torch.randn(4_000_000, device="cuda"), torch.randn(4_000_000, device="cuda")
    packing = Packing([Part(steady, "steady"), Part(other, "other", steady=False)], Movers(1))
    memory = payload(packing.num_bytes)
    wanted = [raw(steady), raw(other)]
    delay()
    passage = packing.begin(memory)
    other.zero_()  # waits in its stream for its copy
    with torch.cuda.stream(torch.cuda.Stream()):
        steady.zero_()  # waits for nothing
    passage.finish()
    assert there([steady, other], memory) == [bytes(16_000_000), wanted[1]]
    assert passage.touched() == ["steady"]


def test_memory_is_given_to_nobody_before_it_is_copied(payload):
    parts = [Part(torch.randn(4_000_000, device="cuda"), f"t{i}") for i in range(4)]
    wanted = [raw(part.local) for part in parts]
    packing = Packing(parts, Movers(1))
    memory = payload(packing.num_bytes)
    delay()
    passage = packing.begin(memory)
    for part in parts:
        part.local.data = torch.zeros(4_000_000, device="cuda")  # the old memory is let go by the program
    torch.zeros(8, 4_000_000, device="cuda")
    passage.finish()
    assert there([part.local for part in parts], memory) == wanted
    assert len(passage.touched()) == 4  # whose tensors lie elsewhere: as cautious as it can be


def test_the_launch_waits_for_no_copy(payload):
    packing = Packing(
        [Part(torch.randn(50_000_000, device="cuda")), *(Part(torch.randn(100, device="cuda")) for _ in range(500))], Movers(1)
    )
    memory = payload(packing.num_bytes)
    packing.save(memory)  # makes stream and tray
    delay()
    passage = packing.begin(memory)
    assert not capture_gpu._stream(torch.device("cuda", torch.cuda.current_device())).query()  # not done when it returned
    passage.finish()
