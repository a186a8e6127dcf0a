"""Run: the console script `resilient-run`, one per node: torchrun's flags, plus recovery.

Contract: the zygote is started before anything else, since it takes longest, and hands back the parsed command line; this process never
imports torch. Command line, environment and configuration file are read at the start (launcher.py); everything else is told.
The node that hosts the coordinator runs it in the same event loop, and talks to it over TCP as every other node does.
Exit codes: 0 the script ended well; 1 it did not, or a signal ended the run (as torchrun); 2 wrong usage, before anything is started;
3 this node failed its preflight, likewise.
Which node hosts: `--standalone` this one; `--rdzv-backend static` the one with `--node-rank 0`; `c10d` the first process that can bind the
endpoint's port on the machine that the endpoint names (torchrun's rule).
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from resilient_agents.nursery import Nursery

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run a script on this node; gives the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    nursery = Nursery(argv)
    from resilient_agents import launcher  # noqa: PLC0415 - while the zygote imports torch, we import the rest

    return launcher.run(nursery)


if __name__ == "__main__":
    sys.exit(main())
