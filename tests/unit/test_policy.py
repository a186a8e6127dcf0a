"""Whose fault is it? Lines that users have seen, and what must come out."""

from __future__ import annotations

import json
import pathlib

import pytest

from resilient.core.cause import Seen
from resilient.core.messages import Finding
from resilient.core.policy import TABLE, Policy, infrastructure, unrelated

LINES = pathlib.Path(__file__).parents[1] / "data" / "lines"
TRACEBACK = """Traceback (most recent call last):
  File "train.py", line 3, in <module>
    raise ConnectionError("CUDA error in the source line")  # quoted source must not count
{message}
"""


@pytest.mark.parametrize(
    "message",
    [
        "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3333",
        "RuntimeError: Timed out waiting 1800000ms for recv operation to complete",
        "torch.distributed.DistBackendError: NCCL error in: ../NCCLUtils.hpp:301, unhandled cuda error",
        "torch.distributed.DistBackendError: ncclRemoteError: A call failed possibly due to a network error",
        "torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be asynchronously reported",
        "RuntimeError: CUDA error: uncorrectable ECC error encountered\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.",
        "RuntimeError: CUDA error: unspecified launch failure",
        "RuntimeError: No CUDA GPUs are available",
        "RuntimeError: DataLoader worker (pid(s) 3316, 3317) exited unexpectedly",
        "torch.distributed.DistStoreError: Timed out after 901 seconds waiting for clients. 1/2 clients joined.",
        "RuntimeError: DataLoader worker (pid 12) is killed by signal: Bus error.",
        "RuntimeError: NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus",
        "OSError: [Errno 5] Input/output error: '/data/x'",
    ],
)
def test_infrastructure(message):
    assert infrastructure(TRACEBACK.format(message=message))
    verdict = Policy(0).judge(Finding(seq=1, kind="exception", text=TRACEBACK.format(message=message)), managed=True, first=True)
    assert verdict.verdict == "replace"
    assert "infrastructure" in verdict.why


@pytest.mark.parametrize(
    "message",
    [
        "ValueError: shapes do not match",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",
        "RuntimeError: CUDA error: device-side assert triggered",
        "RuntimeError: CUDA error: an illegal memory access was encountered",
        "RuntimeError: CUDA error: invalid device ordinal",
        "KeyError: 'excident'",
        "torch.distributed.DistBackendError: ncclInvalidUsage: This usually reflects invalid usage of NCCL library",
    ],
)
def test_the_program(message):
    assert infrastructure(TRACEBACK.format(message=message)) == ""


@pytest.mark.parametrize("name", ["sample", "dev", "heldout"])
def test_the_core_and_the_diagnosis_agree_on_what_is_the_programs(name):
    """The core has words of its own, for it may not read files; no labelled line of a program may be one of them."""
    rows = [json.loads(line) for line in (LINES / f"{name}.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["stream"] == "stderr" and row["class"] == "user"]
    assert rows
    assert {row["id"]: infrastructure(row["text"]) for row in rows if infrastructure(row["text"])} == {}


def exception(step, fingerprint="ValueError", rank=0, **more):
    return Finding(seq=1, kind="exception", step=step, fingerprint=fingerprint, rank=rank, text="ValueError: x", **more)


def test_the_same_exception_at_the_same_step_twice_halts():
    policy = Policy(0)
    assert policy.judge(exception(7), managed=True, first=True).verdict == "replace"
    assert policy.judge(exception(8), managed=True, first=True).verdict == "replace"
    assert policy.judge(exception(7, "KeyError"), managed=True, first=True).verdict == "replace"
    assert policy.judge(exception(7, rank=1), managed=True, first=True).verdict == "halt"


def test_two_ranks_before_any_step_halt_at_once():
    policy = Policy(0)
    assert policy.judge(exception(-1), managed=True, first=True).verdict == "replace"
    assert "2 ranks" in policy.judge(exception(-1, rank=1), managed=True, first=True).why


def test_a_consequence_is_nobodys_fault():
    policy = Policy(0)
    for _ in range(3):
        assert policy.judge(exception(7, consequence=True), managed=True, first=True).verdict == "replace"


def test_an_exit_code_that_comes_again_is_the_programs():
    policy = Policy(0)
    left = Finding(seq=1, kind="exit", exit_code=3, step=5, text="exit code 3")
    assert policy.judge(left, managed=True, first=True).verdict == "replace"
    assert policy.judge(left, managed=True, first=True).verdict == "halt"
    killed = Finding(seq=1, kind="exit", exit_code=-9, step=5)
    assert {policy.judge(killed, managed=True, first=True).verdict for _ in range(5)} == {"replace"}


def test_a_foreign_group_is_judged_as_torchrun_does_but_signals_are_free():
    policy = Policy(1)
    killed = Finding(seq=1, kind="exit", exit_code=-9)
    failed = Finding(seq=1, kind="exit", exit_code=1, text="ValueError: x")
    neighbour = Finding(seq=1, kind="exit", exit_code=1, text="RuntimeError: Connection closed by peer")
    assert [policy.judge(f, managed=False, first=True).verdict for f in (killed, neighbour, failed, failed)] == [
        "restart",
        "restart",
        "restart",
        "halt",
    ]
    assert Policy(0).judge(failed, managed=False, first=False).verdict == "restart"  # it died of the first
    assert Policy(0).judge(Finding(seq=1, kind="stopped"), managed=False, first=True).verdict == "watch"


def test_every_kind_has_a_line():
    assert Policy(0).judge(Finding(seq=1, kind="something new"), managed=True, first=True).verdict == "watch"
    assert all(v.why for v in TABLE.values())


def explained(class_, kind="xid", code="79", proof=True, device="gpu:0"):
    finding = Finding(seq=0, kind=kind, code=code, device=device, class_=class_, ranks=(0,))
    return Seen(0.0, "n0", finding, class_, "watch", "", proof)


def test_broken_hardware_is_nobodys_fault_however_often():
    policy, seen = Policy(0), explained("replace")
    verdicts = [policy.judge(exception(7), managed=True, first=True, explained=seen) for _ in range(3)]
    assert {v.verdict for v in verdicts} == {"replace"}
    assert "xid 79 on gpu:0 (replace) explains it" in verdicts[0].why


def test_a_programs_fault_makes_a_signal_the_programs():
    policy, seen = Policy(0), explained("user", code="31")
    killed = Finding(seq=1, kind="exit", exit_code=-6, step=5)
    assert policy.judge(killed, managed=True, first=True, explained=seen).verdict == "replace"
    assert policy.judge(killed, managed=True, first=True, explained=seen).verdict == "halt"
    consequence = Finding(seq=1, kind="exception", step=5, consequence=True)
    assert policy.judge(consequence, managed=True, first=True, explained=seen).verdict == "replace"


def test_what_a_worker_only_wrote_does_not_save_it_twice():
    policy, seen = Policy(0), explained("gpu-reset", kind="cuda-error", proof=False)
    assert policy.judge(exception(7), managed=True, first=True, explained=seen).verdict == "replace"
    assert policy.judge(exception(7), managed=True, first=True, explained=seen).verdict == "halt"
    killed = Finding(seq=1, kind="exit", exit_code=-6, step=7)
    assert {policy.judge(killed, managed=True, first=True, explained=seen).verdict for _ in range(3)} == {"replace"}


def test_of_a_foreign_group_too():
    failed = Finding(seq=1, kind="exit", exit_code=1, text="ValueError: x")
    killed = Finding(seq=1, kind="exit", exit_code=-6)
    assert Policy(0).judge(failed, managed=False, first=True, explained=explained("replace")).verdict == "restart"
    assert Policy(0).judge(killed, managed=False, first=True).verdict == "restart"
    assert Policy(0).judge(killed, managed=False, first=True, explained=explained("user")).verdict == "halt"


def test_a_signal_from_outside_is_not_the_programs_whatever_it_wrote():
    seen = explained("user", kind="user-exc", code="ValueError", proof=False)
    for managed, verdict in ((True, "replace"), (False, "restart")):
        policy = Policy(0)
        for rank in (0, 1, 1):
            killed = Finding(seq=1, kind="exit", exit_code=-9, step=0, rank=rank)
            assert policy.judge(killed, managed=managed, first=True, explained=seen).verdict == verdict


def test_an_exception_that_was_handled_does_not_make_an_abort_the_programs():
    killed = Finding(seq=1, kind="exit", exit_code=-6, step=5)
    verdicts = {}
    for kind in ("user-exc", "cuda-oom", "cuda-assert"):
        policy, seen = Policy(0), explained("user", kind=kind, code="", proof=False)
        verdicts[kind] = [policy.judge(killed, managed=True, first=True, explained=seen).verdict for _ in range(2)]
    assert verdicts == {"user-exc": ["replace"] * 2, "cuda-oom": ["replace"] * 2, "cuda-assert": ["replace", "halt"]}


def test_errors_that_a_program_has_handled_do_not_make_a_broken_link_its_own():
    seen = explained("user", kind="user-exc", code="ValueError", proof=False)
    error = Finding(
        seq=1, kind="exception", exit_code=1, step=3, fingerprint="x", text="RuntimeError: Connection closed by peer [10.0.0.2]:1"
    )
    assert [Policy(0).judge(error, managed=True, first=True, explained=seen).verdict for _ in range(3)] == ["replace"] * 3
    policy = Policy(0)
    assert {policy.judge(error, managed=True, first=True, explained=seen).verdict for _ in range(3)} == {"replace"}


@pytest.mark.parametrize(
    ("exit_code", "text", "own"),
    [
        (1, "ValueError: Link 3: <inactive>", True),
        (3, "exit code 3", True),
        (1, "RuntimeError: CUDA error: uncorrectable ECC error encountered", False),
        (-6, "killed by signal 6", False),
        (-9, "killed by signal 9", True),
        (None, "", False),
    ],
)
def test_what_no_machine_need_be_broken_for(exit_code, text, own):
    assert unrelated(Finding(seq=1, kind="exit", exit_code=exit_code, text=text), managed=True) is own
    assert unrelated(Finding(seq=1, kind="stopped"), managed=True)
    assert not unrelated(Finding(seq=1, kind="exit", exit_code=1, text="exit code 1"), managed=False), "of which exception nobody said"
    assert unrelated(Finding(seq=1, kind="exit", exit_code=1, text="ValueError: x"), managed=False)
    assert unrelated(Finding(seq=1, kind="exit", exit_code=-9), managed=False)
