"""NVML gauges: what is read of every GPU, and how often.

Think of the dashboard of a car: seven dials, each with a wire of its own to the engine. What is red on each is printed on the glass
(nvml.toml); here is only what the needles show.

Contract: a class is a probe of the group `resilient.probes`; see nvml.py for errors, lost GPUs and readings that a GPU does not have.
A reading is a number under a name that the rules know; a counter is given as the driver counts it.
Numbers: periods are those of the tables beside the rules; all seven together cost well below a thousandth of a core on eight GPUs
(tests/bench/test_nvml.py), driver time apart.
"""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar, Final

from resilient_agents.probe import Surroundings
from resilient_agents.probes.nvml import Card, Gauge

LINKS_MAX: Final = 36  # NVML_NVLINK_MAX_LINKS
BUSY_PERCENT: Final = 50  # of utilisation: a GPU that is used keeps its PCIe generation
FABRIC_DONE: Final = 3  # NVML_GPU_FABRIC_STATE_COMPLETED
MASKS: Final = {"degraded_bandwidth": 0, "route_recovery": 2, "route_unhealthy": 4, "access_timeout": 6}  # two bits each: 1 = true


class Recovery(Gauge):
    """What the driver itself says must be done with the GPU: the best single sign."""

    name = "nvml-recovery"
    period_s = 10.0

    def read(self, card: Card) -> dict[str, float]:  # noqa: D102
        return self.fields(card, ["GET_GPU_RECOVERY_ACTION"])


class Ecc(Gauge):
    """Memory errors, rows that were or could not be replaced, pages that were retired."""

    name = "nvml-ecc"
    period_s = 30.0
    FIELDS: ClassVar = [
        *("ECC_SBE_VOL_TOTAL", "ECC_DBE_VOL_TOTAL", "ECC_DBE_AGG_TOTAL", "RETIRED_SBE", "RETIRED_DBE", "RETIRED_PENDING"),
        *("REMAPPED_UNC", "REMAPPED_PENDING", "REMAPPED_FAILURE", "C2C_LINK_ERROR_INTR"),
    ]

    def read(self, card: Card) -> dict[str, float]:  # noqa: D102
        found = self.fields(card, self.FIELDS)
        if "RETIRED_SBE" in found and "RETIRED_DBE" in found:
            found["retired"] = found["RETIRED_SBE"] + found["RETIRED_DBE"]
            found["retired_dbe_beyond_15"] = max(0, found["RETIRED_DBE"] - 15)
        if (sram := self._sram(card)) is not None:
            found["sram_uncorrected"] = sram.volatileUncParity + sram.volatileUncSecDed
            found["sram_threshold"] = sram.bThresholdExceeded
        return found

    def _sram(self, card: Card) -> Any:
        kind = getattr(self.nvml, "c_nvmlEccSramErrorStatus_v1_t", None)
        if kind is None:
            return None
        status = kind()
        return None if self.ask(self.nvml.nvmlDeviceGetSramEccErrorStatus, card.handle, ctypes.byref(status)) is None else status


class Nvlink(Gauge):
    """Links that went down, and errors on those that are up."""

    name = "nvml-nvlink"
    period_s = 30.0
    TOTALS: ClassVar = [
        *("NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL", "NVLINK_CRC_DATA_ERROR_COUNT_TOTAL", "NVLINK_REPLAY_ERROR_COUNT_TOTAL"),
        *("NVLINK_RECOVERY_ERROR_COUNT_TOTAL", "NVLINK_ECC_DATA_ERROR_COUNT_TOTAL"),
    ]
    LINKWISE: ClassVar = [
        *("NVLINK_ERROR_DL_REPLAY", "NVLINK_ERROR_DL_RECOVERY", "NVLINK_ERROR_DL_CRC"),
        *("NVLINK_COUNT_MALFORMED_PACKET_ERRORS", "NVLINK_COUNT_BUFFER_OVERRUN_ERRORS", "NVLINK_COUNT_RCV_ERRORS"),
        *("NVLINK_COUNT_LINK_RECOVERY_FAILED_EVENTS", "NVLINK_COUNT_LINK_RECOVERY_EVENTS", "NVLINK_PLR_XMIT_RETRY_BLOCKS"),
    ]

    def __init__(self, surroundings: Surroundings) -> None:
        """Nothing is known of the GPUs yet."""
        super().__init__(surroundings)
        self._up: dict[int, set[int]] = {}  # the links that have been seen up, by GPU
        self._has: dict[int, list[str]] = {}  # which of LINKWISE a GPU has

    def read(self, card: Card) -> dict[str, float]:  # noqa: D102
        index = card.gpu.index
        links = range(LINKS_MAX) if index not in self._up else sorted(self._up[index])
        states = {}
        for link in links:
            state = self.ask(self.nvml.nvmlDeviceGetNvLinkState, card.handle, link)
            if state is not None:
                states[link] = state
        up = self._up.setdefault(index, {link for link, state in states.items() if state})
        if not up:
            return {}
        down = sorted(link for link in up if states.get(link) == 0)
        self.notes[card.gpu.device, "links_down"] = "links " + " ".join(map(str, down))
        found = {"links_down": float(len(down)), "links": float(len(up))} | self.fields(card, self.TOTALS)
        first = min(up)
        if index not in self._has:  # one link tells which counters there are; the others are then asked for those only
            self._has[index] = list(self.fields(card, self.LINKWISE, [first]))
        return found | self.fields(card, self._has[index], sorted(up))


class Pcie(Gauge):
    """Lanes and speed that are missing, errors on the way to the GPU."""

    name = "nvml-pcie"
    period_s = 30.0
    FIELDS: ClassVar = [
        *("PCIE_REPLAY_COUNTER", "PCIE_REPLAY_ROLLOVER_COUNTER", "PCIE_L0_TO_RECOVERY_COUNTER"),
        *("PCIE_COUNT_CORRECTABLE_ERRORS", "PCIE_COUNT_NON_FATAL_ERROR", "PCIE_COUNT_FATAL_ERROR"),
    ]

    def read(self, card: Card) -> dict[str, float]:  # noqa: D102
        nvml, handle = self.nvml, card.handle
        found = self.fields(card, self.FIELDS)
        width, widest = self.ask(nvml.nvmlDeviceGetCurrPcieLinkWidth, handle), self.ask(nvml.nvmlDeviceGetMaxPcieLinkWidth, handle)
        if width and widest:
            found["lanes_missing"] = widest - width
            self.notes[card.gpu.device, "lanes_missing"] = f"x{width} of x{widest}"
        speed, fastest = (
            self.ask(nvml.nvmlDeviceGetCurrPcieLinkGeneration, handle),
            self.ask(nvml.nvmlDeviceGetMaxPcieLinkGeneration, handle),
        )
        if speed and fastest:
            use = self.ask(nvml.nvmlDeviceGetUtilizationRates, handle) if speed < fastest else None
            found["generations_missing"] = fastest - speed if use is not None and use.gpu >= BUSY_PERCENT else 0
            self.notes[card.gpu.device, "generations_missing"] = f"generation {speed} of {fastest}"
        return found


class Clocks(Gauge):
    """Why the clocks are lower than they could be, where the reason is no choice of anybody."""

    name = "nvml-clocks"
    period_s = 30.0

    def read(self, card: Card) -> dict[str, float]:  # noqa: D102
        found = {}
        reasons = self.ask(self.nvml.nvmlDeviceGetCurrentClocksEventReasons, card.handle)
        if reasons is not None:
            thermal, brake = bool(reasons & 0x40), bool(reasons & 0x80)
            found = {
                "sw_thermal": float(bool(reasons & 0x20)),
                "hw_thermal": float(thermal),
                "power_brake": float(brake),
                "hw_slowdown": float(bool(reasons & 0x8) and not thermal and not brake),  # 0x8 stands beside its own reasons
            }
        mode = self.ask(self.nvml.nvmlDeviceGetPersistenceMode, card.handle)
        return found if mode is None else found | {"persistence": float(mode)}


class Thermal(Gauge):
    """How far it is to the temperatures that the GPU itself acts at."""

    name = "nvml-thermal"
    period_s = 10.0

    def __init__(self, surroundings: Surroundings) -> None:
        """Nothing is known of the GPUs yet."""
        super().__init__(surroundings)
        self._marks: dict[int, dict[str, int]] = {}  # by GPU; they do not change

    def read(self, card: Card) -> dict[str, float]:  # noqa: D102
        nvml, handle = self.nvml, card.handle
        marks = self._marks.get(card.gpu.index)
        if marks is None:
            asked = {"shutdown": 0, "slowdown": 1, "memory": 2}  # nvmlTemperatureThresholds_t
            limits = {name: self.ask(nvml.nvmlDeviceGetTemperatureThreshold, handle, number) for name, number in asked.items()}
            marks = self._marks[card.gpu.index] = {name: limit for name, limit in limits.items() if limit}
        found = {}
        core = self.ask(nvml.nvmlDeviceGetTemperatureV, handle, 0)
        if core is None:  # a driver before R565
            core = self.ask(nvml.nvmlDeviceGetTemperature, handle, 0)
        if core:
            found = {f"over_{name}": core - mark for name, mark in marks.items() if name != "memory"}
        memory = self.fields(card, ["MEMORY_TEMP"]).get("MEMORY_TEMP")
        if memory and "memory" in marks:
            found["over_memory"] = memory - marks["memory"]
        for name in found:
            self.notes[card.gpu.device, name] = f"{memory if name == 'over_memory' else core:g} C"
        return found


class Fabric(Gauge):
    """Whether the GPU has its place in the NVLink fabric, and how that place is."""

    name = "nvml-fabric"
    period_s = 30.0

    def read(self, card: Card) -> dict[str, float]:  # noqa: D102
        info = self.nvml.c_nvmlGpuFabricInfo_v2_t()
        if self.ask(self.nvml.nvmlDeviceGetGpuFabricInfoV, card.handle, ctypes.byref(info)) is None or info.state == 0:
            return {}  # a GPU without a fabric
        done = info.state == FABRIC_DONE
        alone = len(self.session.cards()) < 2  # a single GPU of a virtual machine is often not registered, and needs no fabric
        found = {"incomplete": float(not done and not alone), "status": float(info.status if done else 0)}
        found |= {name: float((info.healthMask >> shift) & 3) for name, shift in MASKS.items()}
        return found | {"misconfigured": float((info.healthMask >> 8) & 15)}
