"""Whether a checkpoint costs what the run says that it costs (`pytest -m bench -s tests/bench/test_cadence.py`).

The same training with and without checkpoints, in turn: what the clock says that one cost (the difference, per checkpoint) beside what
status.json says, from the stall and the steps beside the write alone, with no undisturbed run to compare with. 10 M parameters, Adam, two
ranks. The difference of two wall times is the noisier one: the null (two runs without) is told beside it.
"""

from __future__ import annotations

import pathlib
import statistics
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "process"))
from launched import Launched
from told import told

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800)]
GPT = str(pathlib.Path(__file__).parents[2] / "examples" / "train_gpt.py")
FROM, TO, EVERY, TIMES = 10, 70, 15, 3


def run(where: pathlib.Path, every: int, name: str) -> tuple[float, dict]:
    """Seconds of the steps from FROM to TO, and what status.json said of checkpoints in the end."""
    flags = ["--nproc-per-node", "2", "--checkpoint", f"file://{where}/{name}.kept", "--checkpoint-every", str(every)]
    with Launched(where, flags, GPT, ["--steps", str(TO + 2)], name=name) as it:
        assert it.wait(600) == 0, it.text()
    at = {e["step"]: e["t"] for e in it.events("log") if e["rank"] == 0}
    return at[TO] - at[FROM], it.status()["checkpoint"]


def test_what_one_costs(tmp_path):
    rows, without, with_ = [], [], []
    for i in range(TIMES):
        plain, _ = run(tmp_path, 0, f"plain{i}")
        kept, said = run(tmp_path, EVERY, f"kept{i}")
        without.append(plain)
        with_.append(kept)
        rows.append(
            {
                "pair": i,
                "without, s": round(plain, 2),
                "with, s": round(kept, 2),
                "said: cost_s": said["cost_s"],
                "stall_s": said["stall_s"],
                "step_s": said["step_s"],
            }
        )
    count = TO // EVERY
    truth = (statistics.median(with_) - statistics.median(without)) / count
    told(
        "cadence",
        rows,
        clock_s=round(truth, 3),
        said_s=statistics.median(r["said: cost_s"] for r in rows),
        null_s=round((max(without) - min(without)) / count, 3),
    )
