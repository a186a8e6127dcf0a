"""Arguments: torchrun's flags keep torchrun's meaning, and what cannot be honoured is refused by name."""

from __future__ import annotations

import os
import re

import pytest
from resilient_agents import arguments
from resilient_agents.orders import Launch, Misused, Program
from torch.distributed import run as torchrun


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("PET_", "TORCHELASTIC_", "TORCH_ELASTIC_")) or name == "OMP_NUM_THREADS":
            monkeypatch.delenv(name)
    yield
    os.environ.pop("OMP_NUM_THREADS", None)  # torchrun's own code sets it


def parsed(*argv: str) -> Launch:
    answer = arguments.parse(argv)
    assert isinstance(answer, Launch), answer
    return answer


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (["--help"], 0, "--standbys"),
        (["--no-such-flag", "x.py"], 2, "unrecognized arguments|required"),
        (["--standalone", "--nproc-per-node", "banana", "x.py"], 2, "banana"),
        (["--standalone", "--nproc-per-node", "gpu", "x.py"], 2, "--nproc-per-node gpu: Cuda is not available"),
        (["--standalone", "--nproc-per-node", "0", "x.py"], 2, "at least 1 expected"),
        (["--nnodes", "3:2", "x.py"], 2, "min_nodes"),
        (["--max-restarts", "-1", "--standalone", "x.py"], 2, "max_restarts"),
        (["--rdzv-backend", "etcd-v2", "--rdzv-endpoint", "h:1", "x.py"], 2, "c10d"),
        (["--rdzv-backend", "c10d", "--rdzv-endpoint", "h:x", "x.py"], 2, "port"),
        (["--standalone", "--redirects", "9", "x.py"], 2, "9 does not match"),
        (["--standalone", "--shadows", "some", "x.py"], 2, "invalid choice"),
        (["--standalone", "--logs-specs", "mine", "x.py"], 2, "--logs-specs: not supported"),
        (["--standalone", "--no-python", "-m", "x"], 2, "--no-python"),
        (["--standalone"], 2, "required: training_script"),
    ],
)
def test_what_is_refused(argv, code, text):
    if "gpu" in argv and __import__("torch").cuda.is_available():
        pytest.skip("there is a GPU")
    answer = arguments.parse(argv)
    assert isinstance(answer, Misused)
    assert answer.exit_code == code
    assert re.search(text, answer.text), answer.text


def test_one_node_alone_is_standalone_as_in_torchrun():
    launch = parsed("--nproc-per-node", "3", "train.py", "--lr", "1", "--standbys", "9")
    by_port = torchrun.get_args_parser().get_default("master_port") is not None  # torch 2.11: such a run meets at port 29500
    assert (launch.standalone, launch.nodes_max, launch.slots) == (not by_port, 1, 3)
    assert launch.program == Program(kind="script", target="train.py", arguments=("--lr", "1", "--standbys", "9"))
    assert launch.ours == {}  # what follows the script is the script's
    assert launch.shutdown_timeout_s == 30.0
    assert launch.signals == ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")


def test_a_static_rendezvous():
    launch = parsed("--nnodes", "2", "--node-rank", "1", "--master-addr", "10.0.0.1", "--master-port", "1234", "train.py")
    assert (launch.standalone, launch.backend, launch.host, launch.port, launch.node_rank) == (False, "static", "10.0.0.1", 1234, 1)
    assert parsed("--nnodes", "2", "train.py").port == 29500


def test_a_c10d_rendezvous():
    flags = [
        "--nnodes",
        "1:4",
        "--rdzv-backend",
        "c10d",
        "--rdzv-id",
        "job",
        "--rdzv-endpoint",
        "localhost",
        "--rdzv-conf",
        "join_timeout=7",
    ]
    launch = parsed(*flags, "train.py")
    assert (launch.nodes_min, launch.nodes_max, launch.run_id) == (1, 4, "job")
    assert (launch.host, launch.port, launch.is_here) == ("localhost", 29400, True)
    assert launch.endpoint_conf["join_timeout"] == "7"


def test_ours_and_theirs_beside_each_other():
    launch = parsed(
        "--standalone",
        "--standbys=2",
        "--run_dir",
        "here",
        "--nproc_per_node=2",
        "-r",
        "0:1,1:3",
        "-t",
        "2",
        "--shadows",
        "all",
        "-m",
        "pkg.train",
    )
    assert launch.ours == {"standbys": "2", "run_dir": "here", "shadows": "all"}
    assert (launch.redirects, launch.tee) == ((1, 3), (2, 2))
    assert launch.program == Program(kind="module", target="pkg.train")


def test_torchruns_flag_for_patience():
    answer = arguments.parse(["--standalone", "--shutdown-timeout", "4", "train.py"])
    assert "unrecognized" in answer.text if isinstance(answer, Misused) else answer.shutdown_timeout_s == 4.0  # since torch 2.12


def test_torchruns_variables(monkeypatch):
    monkeypatch.setenv("PET_NPROC_PER_NODE", "2")
    monkeypatch.setenv("PET_STANDALONE", "1")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "3")
    launch = parsed("train.py")
    assert (launch.slots, launch.standalone, launch.shutdown_timeout_s) == (2, True, 3.0)
    assert arguments.wants_one_thread(["train.py"])


def test_another_program(monkeypatch):
    launch = parsed("--standalone", "--no-python", "echo", "${local_rank}")
    assert launch.program == Program(kind="exec", target="echo", arguments=("${local_rank}",), command=("echo", "${local_rank}"))
    monkeypatch.setenv("PYTHON_EXEC", "/opt/other/python")
    launch = parsed("--standalone", "train.py", "a")
    assert launch.program.command == ("/opt/other/python", "-u", "train.py", "a")
    assert launch.program.kind == "exec"


def test_a_flag_without_effect_is_said():
    assert "--event-log-handler console" in parsed("--standalone", "--event-log-handler", "console", "train.py").warnings[0]


@pytest.mark.parametrize(
    ("argv", "one"),
    [
        ([], False),
        (["--nproc-per-node", "1"], False),
        (["--nproc-per-node=4"], True),
        (["--nproc_per_node", "4"], True),
        (["--nproc", "4"], True),
        (["--nproc-per-node", "auto"], True),
        (["train.py", "--nproc-per-node", "4"], False),
    ],
)
def test_the_guess_about_openmp(argv, one):
    assert arguments.wants_one_thread(argv) is one
