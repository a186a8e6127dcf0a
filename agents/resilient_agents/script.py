"""Script: runs the user's program in a forked worker as `python -u script.py ...` would.

Contract: the program finds a `__main__` of its own, sys.argv, sys.path[0] and unbuffered output as after a cold start, and no sign of us
in its tracebacks. Exceptions leave through the top of the interpreter: exit code, atexit and excepthook are Python's own.
On an uncaught exception, before that: torchrun's error file is written by torchrun's own handler, and the agent is told (`Raised`, where
the worker had joined).
`--no-python`, and another interpreter, start cold by exec.
"""

from __future__ import annotations

import importlib.machinery
import os
import pkgutil
import runpy
import signal
import string
import sys
import types
import zipfile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import TracebackType

    from resilient_agents.orders import Program

_OURS = frozenset({__file__, __file__.replace("script.py", "zygote.py"), "<string>"})


def run(program: Program, local_rank: int) -> None:
    """Run it; ends as the program ends."""
    arguments = [string.Template(word).safe_substitute(local_rank=str(local_rank)) for word in program.arguments]
    if program.kind == "exec":
        _exec(program, arguments)
    try:
        _execute(program, arguments)
        _conclude()
    except SystemExit as leaving:
        if leaving.code in (None, 0):
            _conclude()
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        error.__traceback__ = _users_part(error.__traceback__)
        _tell(error)
        _hide_our_frames()
        raise


def _exec(program: Program, arguments: list[str]) -> None:
    command = [*program.command[: len(program.command) - len(arguments)], *arguments]
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)
    sys.stdout.flush()
    try:
        os.execvp(command[0], command)  # noqa: S606
    except OSError as error:
        sys.stderr.write(f"resilient-run: {command[0]}: cannot be started ({error.strerror})\n")
        os._exit(127)


def _execute(program: Program, arguments: list[str]) -> None:
    main = types.ModuleType("__main__")
    main.__dict__.update(__annotations__={}, __builtins__=sys.modules["builtins"])
    sys.modules["__main__"] = main
    target = program.target
    flag = ["-m", target] if program.kind == "module" else [target]
    sys.orig_argv[:] = [sys.executable, "-u", *flag, *arguments]
    if program.kind == "module":
        _put_first_on_path(os.getcwd())
        sys.argv[:] = ["-m", *arguments]
        runpy._run_module_as_main(target)  # type: ignore[attr-defined]  # noqa: SLF001 - this is what `python -m` calls
    elif program.kind == "run_path":
        sys.argv[:] = [target, *arguments]
        runpy.run_path(target, run_name="__main__")
    elif os.path.isdir(target) or zipfile.is_zipfile(target):
        sys.argv[:] = [target, *arguments]
        _put_first_on_path(os.path.abspath(target))
        runpy._run_module_as_main("__main__", False)  # type: ignore[attr-defined]  # noqa: FBT003, SLF001
    else:
        sys.argv[:] = [target, *arguments]
        _put_first_on_path(os.path.dirname(os.path.realpath(target)))
        _execute_file(target, main.__dict__)


def _put_first_on_path(entry: str) -> None:
    if not sys.flags.safe_path:
        sys.path.insert(0, entry)


def _execute_file(target: str, namespace: dict[str, Any]) -> None:
    path = os.path.abspath(target)
    loader = importlib.machinery.SourceFileLoader("__main__", path)
    namespace.update(__file__=path, __cached__=None, __loader__=loader, __spec__=None, __package__=None)
    try:
        with open(path, "rb") as file:
            code = pkgutil.read_code(file)  # a .pyc
        if code is None:
            with open(path, "rb") as file:
                code = compile(file.read(), path, "exec", dont_inherit=True)
    except OSError as error:
        sys.stderr.write(f"{sys.executable}: can't open file {path!r}: [Errno {error.errno}] {error.strerror}\n")
        sys.exit(2)
    exec(code, namespace)  # noqa: S102 - running the user's program is what this is for


def _conclude() -> None:
    """The script ran to its end: what it left open of its run ends with the other ranks."""
    training: Any = sys.modules.get("resilient.train.run")
    if training is not None:
        training.ended()


def _tell(error: BaseException) -> None:
    """Torchrun's error file, then the agent: it may end the run at once, and shows that file."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler  # noqa: PLC0415

    file = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    if isinstance(error, Exception) and file and not os.path.exists(file):  # @record may have written it already
        get_error_handler().record_exception(error)
    training: Any = sys.modules.get("resilient.train.run")
    if training is not None:
        training.report_exit(error)


def _users_part(traceback: TracebackType | None) -> TracebackType | None:
    while traceback is not None and traceback.tb_frame.f_code.co_filename in _OURS:
        traceback = traceback.tb_next
    return traceback


def _hide_our_frames() -> None:
    """The exception passes our frames again on its way out; show it without them."""
    shown = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        shown(kind, error.with_traceback(_users_part(traceback)), _users_part(traceback))

    sys.excepthook = hook
