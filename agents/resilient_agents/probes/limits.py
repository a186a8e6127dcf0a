"""Limits: from when on the built-in probes call a number a fact, how often they look, and who says so.

Contract: data. `source` names the project or document whose limit it is; "ours" has its reason behind it. Counters of InfiniBand and
Ethernet are rows, so that one that is missing is added here and nowhere else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from resilient.core.messages import Class


class Limit(NamedTuple):
    """One number."""

    value: float
    source: str


LOOKBACK_S: Final = Limit(7200, "Azure's node health checks: at a job's start, the kernel's log of two hours")
MEMORY_FREE_BYTES: Final = Limit(100 << 20, "gpud: less than 100 MiB available")
DISK_LOW_SHARE: Final = Limit(0.10, "gpud: less than 10 % free")
DISK_LOW_BYTES: Final = Limit(500 << 20, "gpud: or less than 500 MB")
DISK_FULL_BYTES: Final = Limit(16 << 20, "ours: the next log rotation or compiled kernel fails")
INODES_FULL: Final = Limit(100, "ours: one evidence directory with its files")
SHM_FULL_SHARE: Final = Limit(0.02, "ours: a data loader's batch; the writer gets SIGBUS, no error")
FILES_SHARE: Final = Limit(0.90, "ours: file-nr against file-max")
WORKER_FILES_SHARE: Final = Limit(0.95, "ours: of its own limit; the next open fails")
ZOMBIES: Final = Limit(1000, "gpud: degraded at 1000")
D_STATE_TIMES: Final = Limit(5, "gpud: the same process in 5 checks of 60 s")
D_STATE_PERIOD_S: Final = Limit(60, "gpud")
CLOCK_JUMP_S: Final = Limit(2.0, "ours: above what NTP slews (0.5 ms/s) between two looks, below what tokens and leases forgive")
STORAGE_SLOW_S: Final = Limit(30, "ours: an fsync behind a whole checkpoint's write-back")
STORAGE_DEAD_S: Final = Limit(150, "gpud: five stats of an NFS mount in a row without an answer, 30 s each")
FLAPS: Final = Limit(3, "NVSentinel: 3 times link_downed")
FLAP_WINDOW_S: Final = Limit(600, "NVSentinel: in 10 min")
ETH_FLAPS: Final = Limit(5, "Azure: 5 lost carriers")
ETH_FLAP_WINDOW_S: Final = Limit(86400, "Azure: in 24 h")
EDAC_CE: Final = Limit(1000, "ours: corrected errors since the start; mcelog warns at 10 a day, a storm costs the CPU")
AER_CORRECTED_PER_H: Final = Limit(1000, "ours: a falling link gives thousands an hour")


class Counter(NamedTuple):
    """A counter of an InfiniBand or RoCE port: `above` more of it within `window_s` is a fact of this class."""

    name: str  # below counters/ or hw_counters/
    above: int
    window_s: float
    class_: Class
    meaning: str
    source: str


COUNTERS: Final = (
    Counter(
        "counters/link_error_recovery", 2, 600, "cordon", "link errors that were recovered from", "kernel ABI; limit as for link_downed"
    ),
    Counter("counters/local_link_integrity_errors", 0, 60, "cordon", "the port's error threshold was passed", "kernel ABI"),
    Counter("counters/excessive_buffer_overrun_errors", 0, 60, "cordon", "buffer overruns in a row", "kernel ABI"),
    Counter("counters/symbol_error", 1000, 600, "cordon", "symbol errors (some are normal on PAM4 links)", "kernel ABI; limit ours"),
    Counter("counters/port_rcv_errors", 100, 600, "cordon", "bad packets received", "kernel ABI; limit ours"),
    Counter("counters/port_xmit_discards", 0, 60, "ignore", "packets dropped at egress: congestion or a dead peer", "kernel ABI"),
    Counter("counters/port_rcv_remote_physical_errors", 0, 60, "ignore", "packets that the far side marked bad", "kernel ABI"),
    Counter("hw_counters/out_of_sequence", 0, 60, "ignore", "packets out of order: normal with adaptive routing", "mlx5 docs"),
    Counter("hw_counters/packet_seq_err", 10000, 600, "cordon", "NAKs for missing packets", "mlx5 docs; limit ours"),
    Counter("hw_counters/local_ack_timeout_err", 0, 60, "app-restart", "no acknowledgement in time: path or peer", "mlx5 docs"),
    Counter("hw_counters/rnr_nak_retry_err", 0, 60, "app-restart", "a receiver that was not ready; retries used up", "mlx5 docs"),
    Counter("hw_counters/req_transport_retries_exceeded", 0, 60, "replace", "transport retries used up (NCCL status 12)", "mlx5 docs"),
    Counter("hw_counters/roce_slow_restart", 0, 60, "ignore", "RoCE slow restarts", "mlx5 docs"),
    Counter("hw_counters/np_cnp_sent", 0, 60, "ignore", "RoCE congestion marks sent", "mlx5 docs"),
    Counter("hw_counters/rp_cnp_handled", 0, 60, "ignore", "RoCE congestion marks handled", "mlx5 docs"),
)
