"""Checkpoints handed on and taken in, from the command line: no process is started, no torch is needed by what is tested."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dist_checkpoint

from resilient.checkpoint import codec, numbers, reshape
from resilient.checkpoint import safetensors as own_safetensors
from resilient.checkpoint.disk import DiskTier
from resilient.checkpoint.export import export_safetensors
from resilient.checkpoint.imported import fit, own_state, rest
from resilient.checkpoint.layout import Layout, Row, Twins
from resilient.checkpoint.slot import Slot
from resilient.checkpoint.snapshot import slot_bytes
from resilient.checkpoint.source import Live
from resilient.checkpoint.storage import Storage
from resilient.checkpoint.tensors import Tensors
from resilient.checkpoint.tier import SnapshotKey
from resilient.cli import main
from resilient.errors import CheckpointError, SnapshotCorrupt, SnapshotMismatch
from resilient.progress import line, size


def state(seed: int = 1) -> dict[str, torch.Tensor]:
    """By the plain module's names."""
    torch.manual_seed(seed)
    return {
        "embed.weight": torch.randn(30, 8),
        "half.weight": torch.randn(9, 8).bfloat16(),
        "half.bias": torch.randn(9).half(),
        "eight": torch.randn(5).to(torch.float8_e4m3fn),
        "ids": torch.arange(7),
        "flag": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "none": torch.zeros(0, 3),
    }


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def leaf(thing):
    dtype = str(getattr(thing, "dtype", "")).removeprefix("torch.")
    return ("tensor", codec.encode([dtype, list(thing.shape), "cpu"]), raw(thing)) if isinstance(thing, torch.Tensor) else None


def own(rank: int, step: int) -> bytes:
    tree = {" rng": {"python": rank}, "model": {"module.norm.mean": torch.tensor([4.0, 9.0])}, "sched": {"last_epoch": step}}
    return codec.encode(tree, leaf=leaf)


def kept(url: Path, step: int, tensors, *, world: int = 2, sharded: bool = False, level: int = 0) -> DiskTier:
    """A committed step, as `world` ranks of DDP or FSDP2 write it."""
    tier, parts = DiskTier(str(url), level=level), []
    url.mkdir(exist_ok=True)
    for rank in range(world):
        rows, memory = [], []
        for name, tensor in tensors.items():
            count = -(-tensor.shape[0] // world) if sharded and tensor.dim() else 0
            begin = min(rank * count, tensor.shape[0]) if count else 0
            box = tensor[begin : begin + count] if count else tensor
            offsets = (begin, *(0,) * (tensor.dim() - 1)) if tensor.dim() else ()
            key = f"model.{name}" if sharded else f"model.module.{name}"
            rows.append(Row(key, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), offsets, tuple(box.shape)))
            memory.append(raw(box))
        layout = Layout(tuple(rows), Twins(rank) if sharded else Twins(0, world), {}, () if sharded else ("model.",))
        data, room = layout.encode(), sum(-(-len(part) // 64) * 64 for part in memory)
        path = url.parent / f"slot-{rank}"
        path.write_bytes(bytes(slot_bytes(len(data), len(own(rank, step)), room)))
        slot = Slot(str(path))
        view = slot.begin(run="run", rank=rank, world_size=world, round=1, layout=data, own=own(rank, step), payload_bytes=room)
        for (offset, length), part in zip(layout.places(), memory, strict=True):
            view[offset : offset + length] = part
        del view
        slot.seal(step)
        parts.append(tier.write(SnapshotKey(rank, step), Live(slot)))
        slot.close()
    tier.commit(step, parts, run="run")
    return tier


def told(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# --------------------------------------------------------------------------- safetensors


@pytest.mark.parametrize(("sharded", "level"), [(False, 0), (True, 3)])
@pytest.mark.parametrize("shard", ["5GB", "300B"])
def test_the_official_library_reads_an_export(tmp_path, sharded, level, shard):
    official = pytest.importorskip("safetensors.torch")
    tensors = state()
    kept(tmp_path / "kept", 7, tensors, sharded=sharded, level=level)
    to = tmp_path / "there"
    assert main(["ckpt", "export", str(tmp_path / "kept"), str(to), "--format", "safetensors", "--max-shard-size", shard]) == 0
    files = sorted(to.glob("*.safetensors"))
    assert (len(files) == 1) == (shard == "5GB")
    found: dict[str, torch.Tensor] = {}
    for file in files:
        part = official.load_file(file)
        assert not found.keys() & part.keys()
        found |= part
    buffer = "module.norm.mean" if sharded else "norm.mean"  # a name is the module's own where nothing wraps it
    expected = {**tensors, buffer: torch.tensor([4.0, 9.0])}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and raw(found[name]) == raw(tensor), name
    if shard != "5GB":
        index = json.loads((to / own_safetensors.INDEX).read_text())
        assert index["weight_map"].keys() == expected.keys()
        assert index["metadata"]["total_size"] == sum(len(raw(t)) for t in expected.values())
        assert all(name in official.load_file(to / file) for name, file in index["weight_map"].items())
    assert main(["ckpt", "export", str(tmp_path / "kept"), str(to), "--format", "safetensors", "--max-shard-size", shard]) == 1


def test_what_the_official_library_writes_becomes_a_step(tmp_path, capsys):
    official = pytest.importorskip("safetensors.torch")
    tensors = state()
    official.save_file(tensors, tmp_path / "weights.safetensors")
    url = tmp_path / "kept"
    assert main(["ckpt", "import", str(tmp_path / "weights.safetensors"), str(url), "--step", "5", "--json"]) == 0
    assert told(capsys)[0]["tensors"] == len(tensors)
    assert main(["ckpt", "verify", str(url)]) == 0
    held = Tensors(DiskTier(str(url)).checkpoint(5))
    for name, tensor in tensors.items():
        assert bytes(held.read(held.entries[f"model.{name}"])) == raw(tensor)
    model = {name: torch.zeros_like(tensor) for name, tensor in tensors.items() if name != "none"}
    dist_checkpoint.load({"model": model}, checkpoint_id=url / "step-00000005", no_dist=True)
    assert all(raw(model[name]) == raw(tensors[name]) for name in model)


@pytest.mark.parametrize("flaw", ["length", "cut", "json", "gap", "overlap", "dtype", "longer"])
def test_a_file_that_is_no_safetensors_is_refused(tmp_path, flaw, capsys):
    text = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": {"dtype": "U8", "shape": [3], "data_offsets": [8, 11]}}
    if flaw == "gap":
        text["b"]["data_offsets"] = [9, 12]
    if flaw == "overlap":
        text["b"]["data_offsets"] = [7, 10]
    if flaw == "dtype":
        text["b"]["dtype"] = "Q4"
    head = json.dumps(text).encode() if flaw != "json" else b'{"a": ['
    data = len(head).to_bytes(8, "little") + head + bytes(11)
    data = {"length": (1 << 40).to_bytes(8, "little") + data[8:], "cut": data[:-1], "longer": data + b"x"}.get(flaw, data)
    (tmp_path / "w.safetensors").write_bytes(data)
    assert main(["ckpt", "import", str(tmp_path / "w.safetensors"), str(tmp_path / "kept")]) == 1
    said = capsys.readouterr().err
    assert "w.safetensors" in said and said.count("\n") == 1
    assert not (tmp_path / "kept").exists()


def written(path: Path, tensors) -> None:
    """By our own writer."""
    front, places = own_safetensors.header((n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items())
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(front + b"".join(raw(tensors[place.name]) for place in places))


def test_shards_and_their_index_must_agree(tmp_path, capsys):
    source = tmp_path / "source"
    written(source / "one.safetensors", {"a": torch.ones(2)})
    written(source / "two.safetensors", {"b": torch.zeros(3)})
    assert main(["ckpt", "import", str(source), str(tmp_path / "kept")]) == 1  # two files, and no index
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (source / own_safetensors.INDEX).write_text(json.dumps(index))
    assert main(["ckpt", "import", str(source), str(tmp_path / "kept")]) == 0
    index["weight_map"]["c"] = "two.safetensors"
    (source / own_safetensors.INDEX).write_text(json.dumps(index))
    assert main(["ckpt", "import", str(source), str(tmp_path / "kept"), "--step", "2"]) == 1
    assert "c: the index" in capsys.readouterr().err
    index["weight_map"]["c"] = "../two.safetensors"
    (source / own_safetensors.INDEX).write_text(json.dumps(index))
    assert main(["ckpt", "import", str(source), str(tmp_path / "kept"), "--step", "2"]) == 1


def test_a_step_that_no_run_would_start_from_is_not_imported(tmp_path, capsys):
    written(tmp_path / "w.safetensors", {"a": torch.ones(2)})
    kept(tmp_path / "kept", 7, state())
    assert main(["ckpt", "import", str(tmp_path / "w.safetensors"), str(tmp_path / "kept"), "--step", "7"]) == 1
    assert "step 7" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["ckpt", "import", str(tmp_path / "w.safetensors"), str(tmp_path / "kept"), "--step", "0"])
    assert caught.value.code == 2


@pytest.mark.parametrize("source", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("target", ["float16", "bfloat16", "float32", "float64"])
def test_numbers_are_converted_as_torch_does(source, target):
    torch.manual_seed(0)
    values = torch.cat(
        [torch.randn(4000) * 10.0 ** torch.randint(-8, 8, (4000,)), torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])]
    )
    values = values.to(getattr(torch, source))
    expected = values.to(getattr(torch, target))
    found = torch.frombuffer(bytearray(numbers.converted(raw(values), source, target)), dtype=getattr(torch, target))
    assert torch.equal(found.isnan(), expected.isnan())
    assert raw(found[~found.isnan()]) == raw(expected[~expected.isnan()])


def test_an_import_converts_piece_by_piece(tmp_path):
    tensors = {"big": torch.randn(1_500_001).bfloat16(), "ids": torch.arange(5)}
    written(tmp_path / "w.safetensors", tensors)
    assert main(["ckpt", "import", str(tmp_path / "w.safetensors"), str(tmp_path / "kept"), "--dtype", "float32"]) == 0
    held = Tensors(DiskTier(str(tmp_path / "kept")).checkpoint(1))
    assert bytes(held.read(held.entries["model.big"])) == raw(tensors["big"].float())
    assert bytes(held.read(held.entries["model.ids"])) == raw(tensors["ids"])


# --------------------------------------------------------------------------- what a run makes of an import


def wanted(*, wrapped: bool = True, tied: bool = False, dtype: str = "float32") -> Layout:
    """Rank 1 of 2: half of one tensor, all of another; its optimizer has state already."""
    head = "model.module." if wrapped else "model."
    rows = (
        Row(f"{head}a", dtype, (4, 2), (2, 0), (2, 2)),
        Row(f"{head}b", "float32", (3,), (0,), (3,)),
        Row(f"optim.state.{head}a.exp_avg", dtype, (4, 2), (2, 0), (2, 2)),
    )
    return Layout(
        rows, Twins(1), {"optim": ((f"{head}a", f"{head}b"),)}, ("model.",) if wrapped else (), {f"{head}other": f"{head}b"} if tied else {}
    )


def taken(tmp_path, tensors):
    written(tmp_path / "w.safetensors", tensors)
    assert main(["ckpt", "import", str(tmp_path / "w.safetensors"), str(tmp_path / "kept")]) == 0
    return DiskTier(str(tmp_path / "kept")).checkpoint(1)


@pytest.mark.parametrize(("wrapped", "tied"), [(True, False), (False, True)])
def test_a_rank_finds_its_boxes_whatever_wraps_them(tmp_path, wrapped, tied):
    tensors = {"a": torch.arange(8.0).view(4, 2), "other" if tied else "b": torch.ones(3), "mean": torch.full((2,), 5.0)}
    whole, asked = taken(tmp_path, tensors), wanted(wrapped=wrapped, tied=tied)
    rows, called = fit(asked, whole.tail(0)[1])
    assert [row.key for row in rows.rows] == [row.key for row in asked.rows[:2]], "no optimizer state"
    payload = memoryview(bytearray(128))
    reshape.assemble(whole, rows, payload, called)
    assert bytes(payload[:16]) == raw(tensors["a"][2:])
    assert bytes(payload[64:76]) == raw(torch.ones(3))
    name = "module.mean" if wrapped else "mean"
    begun = codec.encode({" rng": {"python": 5}, "model": {name: torch.zeros(2)}, "sched": {"last_epoch": 0}}, leaf=leaf)
    after = codec.encode({" rng": {"python": 5}, "model": {name: tensors["mean"]}, "sched": {"last_epoch": 0}}, leaf=leaf)
    assert own_state(begun, asked, rest(whole, asked, called)) == after


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"a": torch.zeros(4, 2)}, "model.b: it is not in the imported step"),
        ({"a": torch.zeros(4, 3), "b": torch.zeros(3)}, r"model.a: float32 \[4, 2\] expected, float32 \[4, 3\] found$"),
        ({"a": torch.zeros(4, 2).half(), "b": torch.zeros(3)}, r"model.a: float32 \[4, 2\] expected, float16 \[4, 2\] found .*--dtype"),
        ({"a": torch.zeros(4, 2), "b": torch.zeros(3)}, "model.mean: it is not in the imported step"),
        ({"a": torch.zeros(4, 2), "b": torch.zeros(3), "mean": torch.zeros(2), "x": torch.zeros(1)}, "model.x: it is in the imported step"),
        ({"a": torch.zeros(4, 2), "b": torch.zeros(3), "mean": torch.zeros(5)}, r"model.mean: float32 \[2\] expected, float32 \[5\] found"),
    ],
)
def test_an_import_of_another_model_is_refused_with_the_name(tmp_path, tensors, said):
    whole, asked = taken(tmp_path, tensors), wanted()
    begun = codec.encode({"model": {"module.mean": torch.zeros(2)}}, leaf=leaf)
    with pytest.raises(SnapshotMismatch, match=said):
        own_state(begun, asked, rest(whole, asked, fit(asked, whole.tail(0)[1])[1]))


# --------------------------------------------------------------------------- show, diff, prune


def test_show_tells_all_of_a_step(tmp_path, capsys):
    kept(tmp_path / "kept", 7, state(), sharded=True, level=3)
    assert main(["ckpt", "show", str(tmp_path / "kept"), "--json"]) == 0
    step, *rows = told(capsys)
    assert (step["step"], step["ranks"], step["run"], step["compression"]) == (7, 2, "run", "stream.zstd/1")
    files = [row for row in rows if "file" in row]
    assert [row["rank"] for row in files] == [0, 1] and files[0]["own_state"] == ["random numbers", "model", "sched"]
    tensors = {row["tensor"]: row for row in rows if "tensor" in row}
    assert tensors["model.embed.weight"]["split"] == "2x1" and tensors["model.embed.weight"]["shape"] == [30, 8]
    assert tensors["model.scalar"]["split"] == "whole"
    assert [row["value"] for row in rows if "value" in row] == ["sched.last_epoch"]
    assert main(["ckpt", "show", str(tmp_path / "kept")]) == 0
    assert "own_state random numbers, model, sched" in capsys.readouterr().out
    assert main(["ckpt", "show", str(tmp_path / "kept"), "--step", "8"]) == 1


def test_equal_steps_are_told_apart_without_reading(tmp_path, capsys):
    kept(tmp_path / "kept", 7, state())
    kept(tmp_path / "other", 7, state())
    for file in (tmp_path / "other" / "step-00000007").glob("rank-*"):
        data = bytearray(file.read_bytes())
        data[: len(data) // 4] = bytes(len(data) // 4)  # would be noticed if it were read
        file.write_bytes(data)
    assert main(["ckpt", "diff", str(tmp_path / "kept"), str(tmp_path / "other"), "--json"]) == 0
    assert told(capsys)[-1] == {"steps": [7, 7], "tensors_equal": 9, "differences": 0}


@pytest.mark.parametrize("sharded", [False, True])
def test_diff_names_what_differs_and_by_how_much(tmp_path, capsys, sharded):
    before, after = state(), state()
    after["embed.weight"][3, 4] += 0.5
    after["half.weight"][0, 0] = torch.nan
    after["flag"] = torch.tensor([True, True, True])
    after["half.bias"] = after["half.bias"].float()
    after["ids"][1] = 10
    del after["scalar"]
    kept(tmp_path / "kept", 7, before)
    kept(tmp_path / ("other" if sharded else "kept"), 8, after, sharded=sharded, world=3 if sharded else 2)
    there = str(tmp_path / "other") if sharded else "8"
    assert main(["ckpt", "diff", f"{tmp_path / 'kept'}/step-00000007", there, "--json"]) == 1
    *rows, summary = told(capsys)
    found = {row["name"]: row for row in rows}
    assert found["model.scalar"]["differs"] == "only in A"
    assert found["model.flag"]["differs"] == "shape"
    assert found["model.half.bias"]["differs"] == "dtype"
    assert (found["model.embed.weight"]["elements"], found["model.embed.weight"]["max_abs"]) == (1, pytest.approx(0.5))
    assert (found["model.half.weight"]["elements"], found["model.half.weight"]["max_abs"]) == (1, None)
    assert found["model.ids"]["max_abs"] == 9
    assert found["sched.last_epoch"]["differs"] == "value"
    buffer = {"model.norm.mean", "model.module.norm.mean"} if sharded else set()
    assert found.keys() - buffer == {f"model.{n}" for n in ("scalar", "flag", "half.bias", "embed.weight", "half.weight", "ids")} | {
        "sched.last_epoch"
    }
    assert summary["differences"] == len(rows)


def damage(url: Path, step: int) -> None:
    file = sorted((url / f"step-{step:08d}").glob("rank-*"))[1]
    data = bytearray(file.read_bytes())
    data[700] ^= 1
    file.write_bytes(data)


def test_prune_keeps_the_newest_sound_step_and_what_was_asked_for(tmp_path, capsys):
    url = tmp_path / "kept"
    for step in (10, 20, 30, 40, 50):
        kept(url, step, {"a": torch.randn(400, 3)})
    damage(url, 50)
    arguments = ["ckpt", "prune", str(url), "--keep-last", "1", "--keep-every", "20", "--json"]
    assert main([*arguments, "--dry-run"]) == 1  # a damaged step is there
    rows = told(capsys)
    assert "rank-00001" in rows[0]["error"] and [row["step"] for row in rows[1:]] == [10, 30]
    assert DiskTier(str(url)).steps() == (10, 20, 30, 40, 50)
    assert main(arguments) == 1
    assert DiskTier(str(url)).steps() == (20, 40, 50)
    damage(url, 40)
    assert main(["ckpt", "prune", str(url), "--keep-last", "1"]) == 1
    assert DiskTier(str(url)).steps() == (20, 40, 50)
    damage(url, 20)
    assert main(["ckpt", "prune", str(url), "--keep-last", "1"]) == 1
    assert "nothing is removed" in capsys.readouterr().err
    assert DiskTier(str(url)).steps() == (20, 40, 50)


def test_wrong_usage_is_told_as_such():
    for arguments in (["prune", "u", "--keep-last", "0"], ["export", "u", "d", "--max-shard-size", "5 apples"], ["diff", "a"], ["look"]):
        with pytest.raises(SystemExit) as caught:
            main(["ckpt", *arguments])
        assert caught.value.code == 2


def test_what_is_damaged_is_never_exported(tmp_path, capsys):
    url = tmp_path / "kept"
    kept(url, 7, {"a": torch.randn(400, 3), "b": torch.randn(400, 3)})
    damage(url, 7)
    assert main(["ckpt", "export", str(url), str(tmp_path / "there"), "--format", "safetensors"]) == 1
    assert "rank-00001" in capsys.readouterr().err
    assert not list((tmp_path / "there").glob("*.safetensors*"))
    with pytest.raises(SnapshotCorrupt):
        tensors = Tensors(DiskTier(str(url)).checkpoint(7))
        for entry in tensors.entries.values():
            tensors.read(entry)


def test_any_storage_will_do(tmp_path, capsys):
    written(tmp_path / "w.safetensors", state())
    assert main(["ckpt", "import", str(tmp_path / "w.safetensors"), "memory://handed/kept"]) == 0
    assert main(["ckpt", "export", "memory://handed/kept", "memory://handed/there", "--format", "safetensors"]) == 0
    assert main(["ckpt", "import", "memory://handed/there", "memory://handed/again", "--step", "3"]) == 0
    capsys.readouterr()
    assert main(["ckpt", "diff", "memory://handed/kept", "memory://handed/again", "--json"]) == 0
    assert told(capsys)[-1]["tensors_equal"] == len(state())
    Storage("memory://handed").remove_tree("")


def test_torch_is_not_imported(tmp_path):
    written(tmp_path / "w.safetensors", state())
    program = f"""
import sys
from resilient.cli import main
url, there = {str(tmp_path / "kept")!r}, {str(tmp_path / "there")!r}
assert main(["ckpt", "import", {str(tmp_path / "w.safetensors")!r}, url, "--dtype", "float32"]) == 0
for verb in (["ls", url], ["show", url], ["verify", url], ["diff", url, url], ["prune", url]):
    assert main(["ckpt", *verb]) == 0
assert main(["ckpt", "export", url, there]) == 0
assert main(["ckpt", "export", url, there, "--format", "safetensors"]) == 0
assert "torch" not in sys.modules
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_the_bar_says_how_far_it_is():
    assert line("verify", 5 * 10**8, 10**9, 2.0) == f"verify  {'█' * 12}{'░' * 12}  50%  500 MB of 1 GB  250 MB/s  2 s left"
    assert [size(n) for n in (0, 999, 1000, 12_345_678)] == ["0 B", "999 B", "1 KB", "12.3 MB"]


def test_a_bar_is_drawn_on_a_terminal_and_nowhere_else(tmp_path):
    kept(tmp_path / "kept", 7, state())
    command = [sys.executable, "-m", "resilient.cli", "ckpt", "verify", str(tmp_path / "kept")]
    ours, theirs = pty.openpty()
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, text=True, check=True)
    os.close(theirs)
    drawn = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "verify step 7" in drawn and drawn.endswith("\r\x1b[K")
    assert "verified True" in ended.stdout and "\r" not in ended.stdout
    assert subprocess.run(command, capture_output=True, text=True, check=True).stderr == ""


@pytest.mark.parametrize("level", [0, 3])
def test_no_flipped_byte_reaches_an_export(tmp_path, level):
    """It is refused with the file's name, or it lies where an export does not look, and what comes out is right."""
    tensors = {"a": torch.randn(40, 3), "b": torch.randn(7).bfloat16(), "c": torch.zeros(3, 40)}
    kept(tmp_path / "kept", 7, tensors, sharded=True, level=level)
    arguments = {"name": "model", "shard_bytes_max": 1 << 30}
    sound = tmp_path / "sound"
    export_safetensors(DiskTier(str(tmp_path / "kept")), 7, str(sound), **arguments)
    good, refused = (sound / "model.safetensors").read_bytes(), 0
    for file in sorted((tmp_path / "kept" / "step-00000007").iterdir()):
        data = file.read_bytes()
        for position in range(0, len(data), 31):
            file.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
            to = tmp_path / "to" / f"{file.name}-{position}"
            try:
                export_safetensors(DiskTier(str(tmp_path / "kept")), 7, str(to), **arguments)
            except CheckpointError as error:
                refused += 1
                assert file.name in str(error)
                assert not list(to.glob("*"))
            else:
                assert (to / "model.safetensors").read_bytes() == good
        file.write_bytes(data)
    assert refused > 20


def test_torchs_own_safetensors_storage_reads_an_export_and_writes_an_import(tmp_path):
    pytest.importorskip("safetensors")
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

    tensors = {name: tensor for name, tensor in state().items() if tensor.numel()}
    kept(tmp_path / "kept", 7, tensors)
    there = tmp_path / "there"
    assert main(["ckpt", "export", str(tmp_path / "kept"), str(there), "--format", "safetensors", "--max-shard-size", "300"]) == 0
    found = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    dist_checkpoint.load(found, storage_reader=HuggingFaceStorageReader(str(there)), no_dist=True)
    assert all(raw(found[name]) == raw(tensor) for name, tensor in tensors.items())
    dist_checkpoint.save(found, storage_writer=HuggingFaceStorageWriter(str(tmp_path / "theirs")), no_dist=True)
    assert main(["ckpt", "import", str(tmp_path / "theirs"), str(tmp_path / "again")]) == 0
    held = Tensors(DiskTier(str(tmp_path / "again")).checkpoint(1))
    assert all(bytes(held.read(held.entries[f"model.{name}"])) == raw(tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("form", ["dcp", "safetensors"])
def test_an_export_is_all_or_nothing_and_over_nobodys_files(tmp_path, capsys, monkeypatch, form):
    """Rank files without an index were written over; what an interrupted export left lay about."""
    kept(tmp_path / "kept", 7, state())
    flags = ["--format", form, "--max-shard-size", "300"]
    for free in ("a", "b"):
        (tmp_path / free).mkdir()
        (tmp_path / free / "README").write_text("mine")
    real = Storage.writing
    written = []

    def interrupted(storage, path, about_bytes=0):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        return real(storage, path, about_bytes)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "writing", interrupted)
        assert main(["ckpt", "export", str(tmp_path / "kept"), str(tmp_path / "a"), *flags]) == 130
    assert len(written) == 2
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["README"]
    assert main(["ckpt", "export", str(tmp_path / "kept"), str(tmp_path / "a"), *flags]) == 0
    (tmp_path / "b" / written[1]).write_text("another's")
    assert main(["ckpt", "export", str(tmp_path / "kept"), str(tmp_path / "b"), *flags]) == 1
    assert f"a directory without {written[1]} expected, it is there already" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["README", written[1]]
    assert (tmp_path / "b" / written[1]).read_text() == "another's"


def test_ls_tells_of_files_that_are_gone_and_takes_no_other_directory_for_a_step(tmp_path, capsys):
    url = tmp_path / "kept"
    for step in (6, 7):
        kept(url, step, state())
    (url / "step-000000001").mkdir()  # nine digits
    (url / "step-000000006").mkdir()
    assert main(["ckpt", "ls", str(url)]) == 0
    (url / "step-00000006" / "rank-00001.distcp").unlink()
    capsys.readouterr()
    assert main(["ckpt", "ls", str(url), "--json"]) == 1
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["step"], second["step"], second["ranks"]) == (6, 7, 2)
    assert first["error"].startswith("checkpoint step=6: no such file (") and "rank-00001" in first["error"]
    assert main(["ckpt", "prune", str(url), "--keep-last", "1"]) == 0
    assert sorted(path.name for path in url.iterdir()) == ["step-000000001", "step-000000006", "step-00000007"]
