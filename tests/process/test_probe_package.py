"""The example of a package with a probe: installed by pip, and at work."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from installed import ROOT, path_with
from outside import environment

pytestmark = pytest.mark.process
PACKAGE = ROOT / "examples" / "probe_package"


def installed(where: pathlib.Path) -> str:
    """A path with the package on it."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("pip needs setuptools here to build the package without a network")
    copy = shutil.copytree(PACKAGE, where.parent / "package")  # what a build leaves is left there
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
    ]
    done = subprocess.run([*pip, "--target", str(where), str(copy)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return os.pathsep.join([str(where), path_with(where.parent / "ours")])


def test_it_is_found_and_sees(tmp_path):
    root = tmp_path / "host"
    (root / "run").mkdir(parents=True)
    env = environment(PYTHONPATH=installed(tmp_path / "site"))
    look = [sys.executable, "-P", "-m", "resilient_agents.daemon", "--once", "--root", str(root), "--probes", "maintenance,clock"]
    well = subprocess.run(look, env=env, capture_output=True, text=True, check=False)
    assert well.returncode == 0 and set(json.loads(well.stdout.splitlines()[0])["threads"]) == {"clock", "maintenance"}, well.stderr
    (root / "run/maintenance").write_text("disk swap at noon\n")
    ill = subprocess.run(look, env=env, capture_output=True, text=True, check=False)
    (row,) = [row for line in ill.stdout.splitlines() if (row := json.loads(line))["event"] == "finding"]
    assert ill.returncode == 1
    assert (row["probe"], row["kind"], row["class"], row["text"]) == ("maintenance", "maintenance", "cordon", "disk swap at noon")
