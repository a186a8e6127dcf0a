"""Flight Recorder dumps: who did not come, who came for something else; and nothing in a dump is ever run."""

from __future__ import annotations

import json
import pathlib
import pickle
import pickletools

import pytest
from resilient_agents.diagnosis import readings, recorder

DATA = pathlib.Path(__file__).parents[1] / "data" / "recorder"


def dumps(*per_rank, ranks=None):
    """per_rank: (name, sizes, state) of each collective, from number 1."""
    config = {"0": {"name": "0", "desc": "default_pg", "ranks": json.dumps(ranks if ranks is not None else list(range(len(per_rank))))}}
    made = {}
    for rank, entries in enumerate(per_rank):
        if entries is None:
            continue
        raw = [
            {
                "collective_seq_id": seq,
                "process_group": ["0", "default_pg"],
                "profiling_name": f"nccl:{name}",
                "input_sizes": [sizes],
                "state": state,
                "is_p2p": False,
            }
            for seq, (name, sizes, state) in enumerate(entries, 1)
        ]
        made[rank] = recorder.read(json.dumps({"version": "2.10", "pg_config": config, "entries": raw}).encode())
    return made


DONE, BUSY, QUEUED = ("all_reduce", [4], "completed"), ("all_reduce", [8], "started"), ("all_reduce", [8], "scheduled")


def test_torchs_own_dumps_name_the_rank_that_did_not_enter():
    found = recorder.missing_and_mismatched({rank: readings.dump(str(DATA / f"nccl_trace_rank_{rank}")) for rank in range(3)})
    (it,) = found
    assert (it.kind, it.device, it.class_, it.role) == ("collective-missing", "rank:2", "replace", "cause")
    assert "collective 4 (gloo:all_reduce): 2 of 3 ranks entered" in it.text


def test_a_rank_without_a_dump_is_named_too():
    (it,) = recorder.missing_and_mismatched(dumps([DONE, BUSY], [DONE, BUSY], None, ranks=[0, 1, 2]))
    assert (it.device, it.role) == ("rank:2", "cause")
    found = recorder.missing_and_mismatched(dumps([DONE, BUSY], [DONE], None, ranks=[0, 1, 2]))
    assert [(it.device, it.role) for it in found] == [("rank:1", "cause"), ("rank:2", "context")]


def test_collectives_that_differ_are_the_programs_fault():
    (it,) = recorder.missing_and_mismatched(dumps([DONE, BUSY], [DONE, BUSY], [DONE, ("broadcast", [8], "scheduled")]))
    assert (it.kind, it.class_, it.device) == ("collective-mismatch", "user", "rank:2")
    (it,) = recorder.missing_and_mismatched(dumps([DONE, BUSY], [DONE, BUSY], [DONE, ("all_reduce", [16], "scheduled")]))
    assert "different sizes" in it.text


def test_all_entered_and_one_device_has_not_begun():
    (it,) = recorder.missing_and_mismatched(dumps([DONE, BUSY], [DONE, BUSY], [DONE, QUEUED]))
    assert (it.kind, it.device) == ("collective-missing", "rank:2")
    (it,) = recorder.missing_and_mismatched(dumps([DONE, BUSY], [DONE, BUSY]))
    assert (it.kind, it.class_, it.role) == ("nccl-timeout", "app-restart", "symptom")


def test_all_done_is_nothing():
    assert recorder.missing_and_mismatched(dumps([DONE, DONE], [DONE, DONE])) == []
    assert recorder.missing_and_mismatched(dumps([DONE, DONE], [DONE])) == []  # dumped a moment earlier
    assert recorder.missing_and_mismatched({}) == []


class Harmful:
    def __reduce__(self):
        return (print, ("run!",))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b'{"entries": 3}',
        b'{"entries": [3]}',
        b'{"entries": [], "pg_config": {"0": 7}}',
        b"\x80\x02",
        b"\x80\x02}q\x00.",
        pickle.dumps(Harmful(), protocol=2),
        pickle.dumps({"entries": [Harmful()]}, protocol=4),
        pickle.dumps({"entries": [pathlib.PurePosixPath("x")]}, protocol=2),
        b"\x80\x02ctorch.jit._pickle\nbuild_tensorlist_from_id\n.",
        b"\x80\x02r\xff\xff\xff\x7f.",  # a memo of 2 G places
        b"\x80\x02" + b"(" * 100_000 + b"l" * 100_000 + b".",
    ],
)
def test_what_is_no_dump_is_refused_and_never_run(data, capsys):
    with pytest.raises(recorder.DumpError):
        recorder.read(data)
    assert capsys.readouterr().out == ""


def test_torchs_dumps_hold_containers_and_plain_values_only():
    data = (DATA / "nccl_trace_rank_0").read_bytes()
    names = {str(arg) for op, arg, _ in pickletools.genops(data) if op.name == "GLOBAL"}
    assert names <= {"torch.jit._pickle restore_type_tag", "torch.jit._pickle build_intlist"}


def _of(**wrong):
    entry = {"collective_seq_id": 1, "process_group": ["0", "x"], "profiling_name": "nccl:a", "input_sizes": [[4]], "state": "s"}
    return {"version": "2.10", "entries": [entry | wrong]}


def _laughs(times=40):
    value = [1]
    for _ in range(times):
        value = [value] * 10
    return value


@pytest.mark.parametrize(
    "data",
    [
        json.dumps(_of(collective_seq_id=float("inf"))).encode(),
        json.dumps(_of() | {"pg_config": {"0": {"ranks": [float("inf")]}}}).encode(),
        json.dumps(_of() | {"pg_config": {"0": {"ranks": "[" * 100_000}}}).encode(),
        pickle.dumps(_of(profiling_name=_laughs()), 2),
        pickle.dumps(_of(process_group=[_laughs()]), 2),
        b"\x80\x02ctorch.jit._pickle\nbuild_intlist\nq\x00](" + b"K\x01" * 100_000 + b"eq\x01" + b"h\x00h\x01\x85R" * 1000 + b".",
    ],
)
def test_no_dump_asks_for_more_than_its_size_in_time_or_memory(data):
    with pytest.raises(recorder.DumpError):
        recorder.read(data)


def test_sizes_that_hold_each_other_are_not_followed():
    dump = recorder.read(pickle.dumps(_of(input_sizes=_laughs()), 2))
    assert dump.groups["0"][1].sizes == ()
