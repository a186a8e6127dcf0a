"""NVML: the one conversation with NVIDIA's driver that all its probes share.

Think of the counter of an office: one goes in and takes a number (nvmlInit, the list of GPUs), and after that everybody may ask at the
window of each GPU on his own. A clerk who falls asleep keeps only the one who stands before him.

Contract: `session` raises `Absent` where there is nothing to talk to, and makes no call that could hang. `Session.open` goes in, whoever
comes first; while another is still at it, it waits a second and gives up (`Busy`): only one probe hangs with a driver that hangs.
`Gauge` is the base of the probes that read numbers and leave what they mean to the rules (nvml.toml): a GPU that is lost is passed over
(nvml_gpus.py tells it), a reading that this GPU or driver does not know is left out, any other error is a finding of its own.
The library is found as pynvml finds it: `libnvidia-ml.so.1` by the dynamic loader.
Threads: every probe has its own; NVML is safe for that, and ctypes lets other threads run during a call.
Note: an open session holds /dev/nvidia*; a reset of the GPU (nvidia-smi -r) is refused while it is open.
Rejected: a process per call (nvidia-smi): 0.3-1 s of CPU each on a node of eight; one thread for all calls: one sick GPU blinds all.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Final

from resilient.core.messages import NONE, Class, Finding
from resilient_agents.devices import Gpu, pci, present
from resilient_agents.probe import Absent, Surroundings
from resilient_agents.probes.rules import Judge, load

LIBRARY: Final = "libnvidia-ml.so.1"
RULES: Final = load("nvml.toml")
GPUS_MAX: Final = 64  # a count beyond it is no count
TIMEOUT_S: Final = 30.0  # a first call on a node without persistence mode takes seconds for every GPU
OPENING_S: Final = 120.0  # the same, for all of its GPUs together
WAIT_S: Final = 1.0  # for somebody else's nvmlInit

NOT_FOR_US: Final = frozenset({2, 3, 4, 6, 13, 21, 25, 26})
# INVALID_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, FUNCTION_NOT_FOUND, NO_DATA, ARGUMENT_VERSION_MISMATCH, DEPRECATED
GONE: Final = frozenset({15, 16, 28})  # GPU_IS_LOST, RESET_REQUIRED, GPU_NOT_FOUND: nvml_gpus.py tells it
VALUE: Final = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")  # by nvmlValueType_t


class Busy(Exception):
    """Somebody else is opening the driver, and has been for a second."""


class Card:
    """One GPU of the session: what it is, and the handle that the driver gave for it."""

    __slots__ = ("address", "gpu", "handle")

    def __init__(self, gpu: Gpu, address: str, handle: Any) -> None:
        """See the attributes."""
        self.gpu = gpu
        self.address = address  # as the driver spells it: "00000000:1A:00.0"; "" = it could not say
        self.handle = handle  # None: it could not be opened


class Session:
    """NVML of this process."""

    def __init__(self, nvml: Any, root: str) -> None:
        """See the attributes."""
        self.nvml = nvml
        self.root = root
        self._opening = threading.Lock()
        self._cards: tuple[Card, ...] | None = None

    def open(self) -> tuple[Card, ...]:
        """All GPUs as they were found first. Raises NVMLError, Busy."""
        if (cards := self._cards) is not None:
            return cards
        if not self._opening.acquire(timeout=WAIT_S):
            raise Busy
        try:
            if (cards := self._cards) is None:
                self.nvml.nvmlInit()
                cards = self._cards = self._found()
        finally:
            self._opening.release()
        return cards

    def close(self) -> None:
        """Forget the GPUs; whoever comes next goes in anew."""
        if self._cards is not None:
            self._cards = None
            with contextlib.suppress(self.nvml.NVMLError):
                self.nvml.nvmlShutdown()

    def cards(self) -> tuple[Card, ...]:
        """The GPUs that can be asked; none while the driver cannot be reached."""
        try:
            return tuple(card for card in self.open() if card.handle is not None)
        except (Busy, self.nvml.NVMLError):
            return ()

    def _found(self) -> tuple[Card, ...]:
        count = min(self.nvml.nvmlDeviceGetCount(), GPUS_MAX)
        known = present(self.root)
        cards = []
        for index in range(count):
            handle, address, uuid = None, "", ""  # who cannot be opened is sought by its number again
            try:
                handle = self.nvml.nvmlDeviceGetHandleByIndex(index)
                address = _text(self.nvml.nvmlDeviceGetPciInfo(handle).busId)
                uuid = _text(self.nvml.nvmlDeviceGetUUID(handle))
            except self.nvml.NVMLError as error:
                if error.value not in NOT_FOR_US:
                    handle = None
            place = pci(address) or (known[index].pci if len(known) == count else "")
            cards.append(Card(Gpu(index=index, pci=place, uuid=uuid), address, handle))
        return tuple(cards)


_sessions: dict[str, Session] = {}


def session(surroundings: Surroundings) -> Session:
    """The session of this process. Raises Absent."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        raise Absent("nvidia-ml-py is not installed: pip install 'resilient-run[gpu]'") from None
    if not os.path.exists(surroundings.path("/dev/nvidiactl")) and not on_pci(surroundings.root):
        raise Absent(f"no NVIDIA GPU below {surroundings.path('/sys/bus/pci/devices')}")
    try:
        ctypes.CDLL(LIBRARY)  # loads it, as pynvml will; asks the driver nothing
    except OSError as error:
        raise Absent(f"{LIBRARY} cannot be loaded, though there are NVIDIA GPUs: {error}") from None
    return _sessions.setdefault(surroundings.root, Session(nvml, surroundings.root))


def on_pci(root: str) -> list[str]:
    """NVIDIA's display and compute functions on PCI, but for those that were handed to a virtual machine."""
    devices = Surroundings(root).path("/sys/bus/pci/devices")
    found = []
    for name in _names(devices):
        vendor, kind = _read(f"{devices}/{name}/vendor"), _read(f"{devices}/{name}/class")
        driver = os.path.basename(os.path.realpath(f"{devices}/{name}/driver"))
        if vendor == "0x10de" and kind.startswith("0x03") and driver != "vfio-pci":
            found.append(name)
    return found


class Gauge:
    """A probe that reads numbers of every GPU and lets the rules judge them."""

    name: ClassVar[str]
    period_s: ClassVar[float]
    scope: ClassVar[str] = "node"
    lasting: ClassVar[bool] = True
    timeout_s: ClassVar[float] = TIMEOUT_S

    def __init__(self, surroundings: Surroundings) -> None:
        """See the attributes."""
        self.session = session(surroundings)
        self.nvml = self.session.nvml
        self.judge = Judge(self.name, RULES)
        self.device = ""  # whom it is asking now: where a check hangs
        self.notes: dict[tuple[str, str], str] = {}
        self._unknown: set[tuple[int, int]] = set()  # fields that a GPU does not have are asked for once

    def read(self, card: Card) -> dict[str, float]:
        """What this GPU shows."""
        raise NotImplementedError

    def check(self, now: float) -> list[Finding]:
        """See probe.py."""
        readings, findings = {}, []
        self.notes.clear()
        for card in self.session.cards():
            self.device = card.gpu.device
            try:
                readings[self.device] = self.read(card)
            except self.nvml.NVMLError as error:
                if error.value not in GONE:
                    findings.append(failed(self.name, self.device, error))
        self.device = ""
        return findings + self.judge.look(now, readings, self.notes)

    def hangs(self, seconds: float) -> Finding:
        """What it means that a check does not return."""
        return hanging(self.name, self.device, seconds)

    def ask(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """What the call gives, or None where this GPU or driver does not know it."""
        try:
            return call(*arguments)
        except self.nvml.NVMLError as error:
            if error.value in NOT_FOR_US:
                return None
            raise

    def fields(self, card: Card, names: Iterable[str], links: Sequence[int] = (0,)) -> dict[str, float]:
        """The fields NVML_FI_DEV_<name>, each summed over the links; those that the GPU does not have are left out."""
        wanted = [(name, getattr(self.nvml, f"NVML_FI_DEV_{name}", NONE)) for name in names]
        wanted = [(name, number) for name, number in wanted if number != NONE and (card.gpu.index, number) not in self._unknown]
        asked = [(name, number, link) for name, number in wanted for link in links]
        if not asked:
            return {}
        found: dict[str, float] = {}
        answers = self.ask(self.nvml.nvmlDeviceGetFieldValues, card.handle, [(number, link) for _, number, link in asked])
        for (name, number, _), answer in zip(asked, answers or (), strict=False):
            if answer.nvmlReturn == 0 and answer.valueType < len(VALUE):
                found[name] = found.get(name, 0.0) + float(getattr(answer.value, VALUE[answer.valueType]))
            elif answer.nvmlReturn in GONE:
                raise self.nvml.NVMLError(answer.nvmlReturn)
            elif answer.nvmlReturn in NOT_FOR_US and len(links) == 1:
                self._unknown.add((card.gpu.index, number))
        return found


def hanging(probe: str, device: str, seconds: float) -> Finding:
    """A call that does not return: the driver, or the GPU that it is asking."""
    class_: Class = "gpu-reset" if device or seconds >= OPENING_S else "ignore"
    text = f"NVML has not answered {probe} for {seconds:.0f} s: the driver hangs{f' on {device}' if device else ''}"
    return Finding(seq=0, kind="nvml-hang", text=text, probe=probe, layer="driver", device=device, class_=class_)


def failed(probe: str, device: str, error: Any) -> Finding:
    """An error of the driver that is neither the GPU's end nor a matter of taste."""
    text = f"NVML error {error.value} ({error})"
    return Finding(
        seq=0,
        kind="nvml-error",
        text=text,
        probe=probe,
        layer="driver",
        code=str(error.value),
        device=device,
        class_="ignore",
        role="context",
    )


def _text(value: bytes | str) -> str:
    return value.decode("ascii", "replace") if isinstance(value, bytes) else value


def _names(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []  # not there, or not for us to see


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(4096).strip()
    except OSError:
        return ""
