"""Arguments: the command line, read by torchrun's own parser with our flags added.

Contract: a flag of torchrun means here what it means there, because torchrun's code parses and checks it. What cannot be honoured
is refused by name, never ignored. Runs in the zygote, which has torch loaded anyway; the launcher gets a `Launch` back.
The number of workers may ask for the device count, and asking initialises CUDA, which no fork survives: so that question is put
in a forked process of its own.
Rejected: a parser of our own (it would drift from torchrun's); importing torch in the launcher (two seconds and 300 MB there).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from typing import TYPE_CHECKING, Any, Final

from resilient import config
from resilient.errors import ConfigError
from resilient_agents.orders import Launch, Misused, Program

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

USAGE_EXIT: Final = 2
_SHUTDOWN_TIMEOUT_S: Final = 30.0  # torchrun's


def wants_one_thread(argv: Sequence[str]) -> bool:
    """Whether torchrun would set OMP_NUM_THREADS=1, guessed before torch is imported: the OpenMP library reads it when it is loaded.

    `parse` knows for certain; the zygote starts itself again where the guess was wrong.
    """
    value = os.environ.get("PET_NPROC_PER_NODE", "1")
    for i, word in enumerate(argv):
        name, _, inline = word.replace("_", "-").partition("=")
        if name.startswith("--np") and "--nproc-per-node".startswith(name):
            value = inline or "".join(argv[i + 1 : i + 2])
        if not word.startswith("-") and word.endswith(".py"):
            break  # the script; what follows is its own
    return value != "1"


def parse(argv: Sequence[str]) -> Launch | Misused:
    """Read the command line. Never raises for what a user typed."""
    from torch.distributed import run as torchrun  # noqa: PLC0415 - two seconds, and only the zygote pays them

    parser = torchrun.get_args_parser()
    parser.prog = "resilient-run"
    parser.description = "torchrun's flags, plus recovery of a killed worker without restarting the others."
    config.add_flags(parser)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            args = parser.parse_args(list(argv))
            return _launch(torchrun, args)
    except SystemExit as leave:  # argparse: --help, or a wrong flag
        return Misused(text=said.getvalue(), exit_code=int(leave.code or 0))
    except (ConfigError, ValueError, AssertionError, RuntimeError, OSError) as error:  # what config_from_args raises
        return Misused(text=f"resilient-run: error: {error}\n", exit_code=USAGE_EXIT)


def _launch(torchrun: Any, args: argparse.Namespace) -> Launch:
    from torch.distributed.elastic.multiprocessing import Std  # noqa: PLC0415
    from torch.distributed.elastic.multiprocessing.api import to_map  # noqa: PLC0415
    from torch.distributed.elastic.rendezvous import utils  # noqa: PLC0415

    standalone = _apply_standalone(torchrun, args)
    args.nproc_per_node = str(_slots(torchrun, args.nproc_per_node))
    log_dir = args.log_dir or ""
    args.log_dir = log_dir or os.devnull  # torchrun's default would leave a directory in /tmp; ours is in the run directory
    if args.logs_specs is not None:
        raise ConfigError("--logs-specs: not supported, logs are always laid out as torchrun's default does")
    checked, command, command_args = torchrun.config_from_args(args)
    if checked.rdzv_backend not in {"c10d", "static"}:
        raise ConfigError(f"--rdzv-backend: 'c10d' or 'static' expected, {checked.rdzv_backend!r} found (nodes meet at --rdzv-endpoint)")
    host, port = utils.parse_rendezvous_endpoint(checked.rdzv_endpoint, default_port=29400)
    slots = checked.nproc_per_node
    if slots < 1:
        raise ConfigError(f"--nproc-per-node: at least 1 expected, {slots} found")
    timeout = getattr(checked, "shutdown_timeout", None)  # torchrun has the flag since 2.12
    if timeout is None:
        timeout = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _SHUTDOWN_TIMEOUT_S))
    return Launch(
        program=_program(args, command, command_args),
        nodes_min=checked.min_nodes,
        nodes_max=checked.max_nodes,
        slots=slots,
        run_id=checked.run_id,
        standalone=standalone,
        backend=checked.rdzv_backend,
        host=host,
        port=port,
        is_here=utils._matches_machine_hostname(host),  # noqa: SLF001 - torchrun's rule for who hosts
        endpoint_conf={key: str(value) for key, value in checked.rdzv_configs.items()},
        node_rank=args.node_rank,
        local_addr=checked.local_addr or "",
        role=checked.role,
        max_restarts=checked.max_restarts,
        log_dir=log_dir,
        redirects=tuple(int(v) for v in to_map(Std.from_str(args.redirects), slots).values()),
        tee=tuple(int(v) for v in to_map(Std.from_str(args.tee), slots).values()),
        local_ranks_shown=tuple(sorted(int(word) for word in args.local_ranks_filter.split(",") if word)),
        stdout_filters=tuple(args.duplicate_stdout_filters),
        stderr_filters=tuple(args.duplicate_stderr_filters),
        prefix_template=checked.log_line_prefix_template or "",
        signals=tuple(word.strip() for word in args.signals_to_handle.split(",") if word.strip()),
        shutdown_timeout_s=float(timeout),
        virtual_local_rank=bool(args.virtual_local_rank),
        numa_binding=args.numa_binding or "",
        ours=config.given_flags(vars(args)),
        config=args.config or "",
        warnings=_warnings(args),
    )


def _apply_standalone(torchrun: Any, args: argparse.Namespace) -> bool:
    """What `torchrun.run` does before it looks at anything else. True: one node, any port, a run id of our own if none is given.

    Torchrun gives such a run a new id even then; ours keeps the user's, by which a restart is known for the same run.
    """
    alone = bool(args.standalone)
    if not alone and args.rdzv_backend == "static" and not args.rdzv_endpoint and args.master_port is None:
        alone = torchrun.parse_min_max_nnodes(args.nnodes)[1] == 1
    if alone:
        args.nnodes, args.rdzv_backend, args.rdzv_endpoint = "1", "c10d", "localhost:0"
        args.rdzv_id = "" if args.rdzv_id == "none" else args.rdzv_id
    if args.master_port is None:
        args.master_port = 29500
    return alone


def _slots(torchrun: Any, wanted: str) -> int:
    """--nproc-per-node as a number; words such as "gpu" are looked up in a process that ends afterwards."""
    if wanted.isdigit():
        return int(wanted)
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer: object = torchrun.determine_local_world_size(wanted)
        except ValueError as error:
            answer = str(error)
        os.write(write_end, json.dumps(answer).encode())
        os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as file:
        data = file.read()
    os.waitpid(child, 0)
    answer = json.loads(data or b'"the device count could not be had"')
    if not isinstance(answer, int):
        raise ConfigError(f"--nproc-per-node {wanted}: {answer}")
    return answer


def _program(args: argparse.Namespace, command: Any, command_args: Sequence[str]) -> Program:
    target, arguments = args.training_script, tuple(args.training_script_args)
    if args.run_path:
        return Program(kind="run_path", target=target, arguments=arguments)
    if args.no_python or command != sys.executable:  # PYTHON_EXEC names another interpreter
        return Program(kind="exec", target=target, arguments=arguments, command=(str(command), *command_args))
    return Program(kind="module" if args.module else "script", target=target, arguments=arguments)


def _warnings(args: argparse.Namespace) -> tuple[str, ...]:
    """Flags that are accepted and change nothing here, said once."""
    said = []
    if args.event_log_handler != "null":
        said.append(f"--event-log-handler {args.event_log_handler}: events go to events.jsonl in the run directory instead")
    return tuple(said)
