"""Zygote: a process with torch loaded that makes workers by forking itself.

Think of a photocopier with the original already on the glass: importing torch takes seconds, copying a process that has imported it
takes milliseconds.

Contract: one thread, no tensor operation, no CUDA call, no lock or store held, so that a child finds nothing half-done. The thread count is
checked before every fork and a fork is refused, by name of the threads, if it is not one. A child is the agent's, not
ours: it is forked twice, the middle process ends, and the agent (a child subreaper) becomes its parent, before it asks to die with
the agent. In the child, `main` returns into the user's script at the top of the stack, so that the interpreter ends as it always does.
Started as `python -u -c BOOT <socket> <agent pid> <the launcher's arguments>`; without a script of its own, so nothing of ours or of
the current directory stands on sys.path.
Rejected: CLONE_PARENT (passes by glibc's fork handlers); multiprocessing's forkserver (pickle, and it cannot be a cold start).
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import random
import signal
import socket
import struct
import sys
import time
from typing import TYPE_CHECKING, Final

from resilient.core.messages import Msg
from resilient.wire.frames import Decoder, encode
from resilient_agents import arguments, kernel
from resilient_agents.nursery import BOOT
from resilient_agents.orders import Launch, Spawn, Spawned

if TYPE_CHECKING:
    from collections.abc import Sequence

PRELOAD: Final = (  # what training scripts import; measured in tests/bench: each is 50 ms to 1.2 s of a cold start
    "torch.distributed.run",
    "torch._dynamo",  # building any optimizer imports it
    "torch.optim",
    "torch.nn.parallel",
    "torch.utils.data",
    "torch.amp",
    "torch.optim.swa_utils",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.device_mesh",
    "torch.distributed.checkpoint",
    "resilient",
    "resilient.train.run",
)
_KNOWN: Final = "_RESILIENT_OMP"  # from a zygote that guessed wrong to itself, started again
_ADOPTION_S: Final = 5.0  # the middle process only has to end
_PID: Final = struct.Struct("<q")
_stacks_file: object = None  # faulthandler keeps only the descriptor


def main() -> None:
    """Serve forks until the agent is gone; in a forked child: run its program, and never come back here."""
    line = socket.socket(fileno=int(sys.argv[1]))
    agent = int(sys.argv[2])
    kernel.die_with(agent)
    argv = sys.argv[3:]
    guess = _read_early(argv)
    answer = arguments.parse(argv)
    if isinstance(answer, Launch):
        _start_again_if_guessed_wrong(answer, guess=guess)
    line.sendall(encode(answer))
    if not isinstance(answer, Launch):
        return
    _preload()
    order = _serve(line, agent)
    if order is None:
        os._exit(0)  # the agent has hung up; nothing here is worth a clean end
    if order.kind == "store":
        from resilient_agents import store  # noqa: PLC0415 - in the child only

        store.run()
    else:
        from resilient_agents import script  # noqa: PLC0415

        assert order.program is not None
        script.run(order.program, order.local_rank)


def _read_early(argv: Sequence[str]) -> bool | None:
    """Set what libraries read while they are loaded. Whether we guess that torchrun would have set it; None = we know."""
    told = os.environ.pop(_KNOWN, None)
    one_thread = arguments.wants_one_thread(argv) if told is None else told == "1"
    if "OMP_NUM_THREADS" in os.environ:
        return None  # the user has spoken
    if one_thread:
        os.environ["OMP_NUM_THREADS"] = "1"
    return one_thread if told is None else None


def _start_again_if_guessed_wrong(launch: Launch, *, guess: bool | None) -> None:
    """Load torch again where OMP_NUM_THREADS should have been different when it was loaded. At most once: then we know."""
    needed = launch.slots > 1
    if guess is None or guess == needed:
        return
    os.environ.pop("OMP_NUM_THREADS", None)
    os.environ[_KNOWN] = "1" if needed else "0"
    os.set_inheritable(int(sys.argv[1]), True)  # noqa: FBT003 - it has no name
    os.execv(sys.executable, [sys.executable, "-u", "-c", BOOT, *sys.argv[1:]])  # noqa: S606


def _preload() -> None:
    """Import what scripts will import, and make the heap ready to be shared."""
    for name in PRELOAD:
        _import_if_there(name)
    child = os.fork()  # its fork handler sends OpenBLAS's idle threads home; they come back when somebody multiplies
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    gc.collect()
    gc.freeze()


def _import_if_there(name: str) -> None:
    try:
        __import__(name)
    except ModuleNotFoundError as error:
        if not name.startswith(str(error.name)):
            raise


def _serve(line: socket.socket, agent: int) -> Spawn | None:
    """Answer orders. Returns the order in the child that it makes; None here when the agent is gone."""
    decoder: Decoder[Spawn] = Decoder(Spawn)
    while True:
        data = line.recv(1 << 16)
        if not data:
            return None
        for order in decoder.feed(data):
            unmasked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})  # in a fork's hooks they would be lost
            answer = _fork(order, agent)
            signal.pthread_sigmask(signal.SIG_SETMASK, unmasked)  # here, and in the worker that was made
            if answer is None:
                return order
            line.sendall(encode(answer))


def _fork(order: Spawn, agent: int) -> Msg | None:
    """Make one process. Returns the answer here, and None in the child."""
    threads = kernel.thread_names()
    if len(threads) != 1:
        return Spawned(error=f"zygote: one thread expected before a fork, {len(threads)} found ({', '.join(threads)})")
    read_end, write_end = os.pipe()
    try:
        middle = os.fork()
        if middle == 0:
            middle = os.getpid()
            child = _fork_or_leave()
            if child == 0:
                _become_a_worker(order, agent, middle)
                return None
            os.write(write_end, _PID.pack(child))
            os._exit(0)
    except OSError as error:
        os.close(read_end)
        os.close(write_end)
        return Spawned(error=f"zygote: fork: {error.strerror}")
    os.close(write_end)
    with open(read_end, "rb") as file:
        data = file.read(_PID.size)
    os.waitpid(middle, 0)
    if len(data) != _PID.size:
        return Spawned(error="zygote: fork: the system has no room for another process")
    return Spawned(pid=_PID.unpack(data)[0])


def _fork_or_leave() -> int:
    try:
        return os.fork()
    except OSError:
        os._exit(1)


def _become_a_worker(order: Spawn, agent: int, middle: int) -> None:
    """Turn this copy of the zygote into what a cold start would have made."""
    os.setsid()
    until = time.monotonic() + _ADOPTION_S
    while os.getppid() == middle and time.monotonic() < until:
        time.sleep(0.0002)
    kernel.die_with(agent)  # leaves at once if somebody else became the parent
    kernel.allow_peeping(agent)
    _close_all_but_standard()
    for path, fd in ((order.stdout, 1), (order.stderr, 2)):
        if path:
            opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(opened, fd)
            os.close(opened)
    os.environ.update(order.env)
    if order.stacks:
        global _stacks_file  # noqa: PLW0603
        _stacks_file = open(order.stacks, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the process lives
        faulthandler.register(signal.SIGUSR2, file=_stacks_file, all_threads=True)
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.seed()  # a cold start begins with a seed of its own
    if "multiprocessing.process" in sys.modules:
        import multiprocessing  # noqa: PLC0415

        multiprocessing.current_process().authkey = os.urandom(32)
    if order.numa_binding:
        _bind_to_node(order.local_rank, order.numa_binding)


def _close_all_but_standard() -> None:
    """By what is open, not by what could be: the limit is a thousand million in some containers."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            with contextlib.suppress(OSError):  # the listing's own
                os.close(int(name))


def _bind_to_node(local_rank: int, mode: str) -> None:
    """--numa-binding, by torch's own code."""
    from torch.numa import binding  # noqa: PLC0415

    options = binding.NumaOptions(affinity_mode=binding.AffinityMode(mode))
    binding._maybe_apply_numa_binding_to_current_process(gpu_index=local_rank, numa_options=options)  # noqa: SLF001
