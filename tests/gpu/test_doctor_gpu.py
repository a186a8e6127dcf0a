"""The doctor on GPUs: every device multiplies and copies right, and is told by name (`pytest -m gpu tests/gpu`)."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from outside import environment
from resilient_agents import preflight
from resilient_agents.exercises import matmul

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300), pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.mark.parametrize("format_", ["float32", "bfloat16", "float16"])
def test_products_are_exact(format_: str) -> None:
    found = matmul.measure(torch.matmul, "cuda:0", format_, 4096, 5, 0.1)
    assert found["wrong"] == ""
    assert found["tflops"] > 1


def test_tf32_is_exact_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    assert matmul.measure(torch.matmul, "cuda:0", "float32", 2048, 5, 0.1)["wrong"] == ""


def test_one_bit_of_a_product_is_found() -> None:
    def product(a, b):
        found = a @ b
        found.view(torch.int16)[17, 4] ^= 1
        return found

    assert matmul.measure(product, "cuda:0", "bfloat16", 1024, 5, 0.1)["wrong"] != ""


@pytest.mark.parametrize("quick", [True, False])
def test_all_devices_are_looked_at(quick: bool) -> None:
    command = [sys.executable, "-m", "resilient.cli", "doctor", "--json", "--only", "checks", *(["--quick"] if quick else [])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=280, check=False)
    rows = json.loads(done.stdout)["rows"]
    assert not [row for row in rows if row["state"] == "fail"], rows
    count = torch.cuda.device_count()
    for name, each in [("matmul", 6), ("bandwidth", 1)]:
        assert len([row for row in rows if row["name"] == name and "gpu:" in row["device"]]) == each * count
    ways = [row["what"] for row in rows if row["name"] == "transfer"]
    assert (ways.count("host to device"), ways.count("device to host")) == (count, count)
    assert ways.count("device to device") == (0 if count == 1 else count if quick else count * (count - 1))
    assert any(row["name"] == "all-reduce" and row["what"] == f"nccl, {count} ranks" for row in rows) == (count > 1)


async def test_one_device_is_looked_at_again_and_a_missing_one_is_told() -> None:
    verdict = await preflight.recheck(0, 120.0)
    assert verdict.sound, verdict.text
    assert "gpu:0" in verdict.text
    assert " cpu " not in verdict.text
    verdict = await preflight.recheck(torch.cuda.device_count(), 120.0)
    assert not verdict.sound
    assert f"gpu:{torch.cuda.device_count()} expected" in verdict.text
