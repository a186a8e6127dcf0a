"""The swappable process group: what DDP, FSDP2 and DeviceMesh hold, while the real group inside comes and goes.

Think of a wall socket: the lamp stays plugged in while the power station behind it is changed. Without any power station it runs in
loopback (train/loopback.py): a standby always, everybody else only to finish a broken step harmlessly.

Contract: a `Group` is a torch ProcessGroup in every collective that torch 2.11 to 2.13 calls, in both spellings. It decides nothing:
`Comm` says before each operation whether it runs live, in loopback, or must raise `RoundAborted`; the page's counters say what
was entered and what ended. An operation that fails is filled with its loopback value only after the inner group certainly no longer
writes to its outputs, that is after its work ended.

Thread-safety: operations may be launched from the main thread and from autograd's; futures are completed by one waiter thread.
Rejected: `work.get_future().then(...)` (0.6 ms a step more, and Python on gloo's threads, which then cannot be joined).
"""

from __future__ import annotations

import queue
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor

from resilient.train import loopback
from resilient.train.inner import Apart
from resilient.wire.page import OVERFLOW_SLOT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from resilient.train.comm import Comm
    from resilient.train.inner import Inner

_ECHO, _ADOPT = "echo", "adopt"  # does the loopback value follow from this rank's input, or would it be a peer's value?


# torch's ProcessGroup took new names in 2.13; its backends kept the old ones
_OLD_NAMES = {
    "reduce_scatter_single": "_reduce_scatter_base",
    "reduce_scatter_single_coalesced": "reduce_scatter_tensor_coalesced",
    "all_gather_single": "_allgather_base",
    "all_gather_single_coalesced": "allgather_into_tensor_coalesced",
    "all_to_all_single": "alltoall_base",
}


def _spelled(inner: Any, name: str) -> Callable[..., Any]:
    """The inner group's method for `name`, in whichever spelling it has."""
    return getattr(inner, name, None) or getattr(inner, _OLD_NAMES[name])  # type: ignore[no-any-return]


class Several:
    """Works waited for as one: gloo's backend object shows no coalesced flat collectives to Python."""

    def __init__(self, works: list[Any]) -> None:
        """In the order of their launch."""
        self._works = works

    def wait(self, *timeout: timedelta) -> None:
        """Until all are done; every one is waited for, so that none still writes when the first error goes up.

        timeout: of each; one that is not over by then is an error, and `wait` may be called again.
        """
        errors = []
        for work in self._works:
            try:
                work.wait(*timeout)
            except RuntimeError as error:  # gloo's and nccl's only way to say that a peer is gone
                errors.append(error)
        if errors:
            raise errors[0]

    def is_completed(self) -> bool:
        """Whether all are."""
        return all(work.is_completed() for work in self._works)


def _coalesced(inner: Any, name: str, single: str, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any) -> Any:
    """The coalesced operation, or one after the other where the inner group has none."""
    if hasattr(inner, name) or hasattr(inner, _OLD_NAMES.get(name, name)):
        return _spelled(inner, name)(outputs, inputs, opts)
    return Several([_spelled(inner, single)(output, given, opts) for output, given in zip(outputs, inputs, strict=True)])


class Scattered(Several):
    """A reduce-scatter on gloo, made as gloo makes it: copies are reduced everywhere, and each rank keeps its own chunk.

    Not gloo's own: the work it hands out heeds no timeout and is never completed (c10d's LambdaWork), so whoever waits for it could
    neither be freed nor be told that it failed. To the bit the same: the same all-reduces of the same tensors.
    """

    def __init__(self, inner: Any, copies: Sequence[Tensor], kept: Sequence[tuple[Tensor, Tensor]], opts: Any) -> None:
        """copies: what is reduced, in place. kept: (output, where its chunk lies in the copies)."""
        options = dist.AllreduceOptions()
        options.reduceOp, options.timeout = opts.reduceOp, opts.timeout
        super().__init__([inner.allreduce([copy], options) for copy in copies])
        self._kept = kept

    def wait(self, *timeout: timedelta) -> None:
        """As Several's."""
        super().wait(*timeout)
        for output, chunk in self._kept:
            output.copy_(chunk.view_as(output))
        self._kept = ()  # once: the script may have changed its outputs when it waits again

    @classmethod
    def flat(cls, inner: Any, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any) -> Scattered:
        """inputs: one tensor per output, its chunks one after the other."""
        copies = [given.clone(memory_format=torch.contiguous_format) for given in inputs]
        chunks = [copy.view(inner.size(), -1)[inner.rank()] for copy in copies]
        return cls(inner, copies, list(zip(outputs, chunks, strict=True)), opts)

    @classmethod
    def listed(cls, inner: Any, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any) -> Scattered:
        """inputs: one list of chunks per output."""
        copies = [[chunk.clone(memory_format=torch.contiguous_format) for chunk in chunks] for chunks in inputs]
        kept = [(output, mine[inner.rank()]) for output, mine in zip(outputs, copies, strict=True)]
        return cls(inner, [copy for mine in copies for copy in mine], kept, opts)


class Held(dist.Work):
    """One operation in flight (or already done). Torch waits on it as on any work."""

    def __init__(self, group: Group, op: Operation, inner: Inner | None, work: Any) -> None:
        """`work` is the inner group's own, None if the operation was completed in loopback."""
        super().__init__()
        self._group = group
        self._op = op
        self._inner = inner
        self._work = work
        self._lock = threading.Lock()
        self._done = work is None
        self._error: BaseException | None = None
        self._future: Any = None

    def wait(self, timeout: Any = None) -> bool:  # noqa: ARG002  the inner group's own timeout bounds it
        """Block until done. Raises RoundAborted if the round broke where loopback is not allowed."""
        self.finish()
        if self._error is not None:
            raise self._error
        return True

    def finish(self) -> None:
        """Bring the operation to its end, once; whoever comes second waits for the first."""
        with self._lock:
            if self._done:
                return
            since = time.monotonic_ns()
            try:
                self._await()
            except RuntimeError as error:  # gloo's and nccl's only way to say that a peer is gone
                self._error = self._group.comm.failed(self._op, self._inner, error)
            else:
                self._op.record()
            self._done = True
            self._work = None  # torch's work holds the inner group; let it go
            self._group.comm.left(self._group, self._inner, self._op.slot, since)

    def _await(self) -> None:
        assert self._inner is not None, "completed in loopback"
        apart = self._op.name in ("send", "recv") and self._inner.kind == "gloo"
        self._inner.wait(Apart(self._work) if apart else self._work)

    def is_completed(self) -> bool:
        """Whether `wait` would return at once."""
        work = self._work  # the waiter thread may let go of it at any moment
        return self._done or work is None or bool(work.is_completed())

    def is_success(self) -> bool:
        """Whether it ended well."""
        return self.is_completed() and self._error is None

    def result(self) -> list[Tensor]:
        """The output tensors."""
        return list(self._op.outputs)

    def synchronize(self) -> None:
        """As `wait`."""
        self.wait()

    def get_future(self) -> Any:
        """A future of the output tensors; completed by the waiter thread (DDP's reducer asks for it)."""
        if self._future is None:
            devices: list[Any] = sorted({t.device for t in self._op.outputs if t.device.type == "cuda"}, key=str)
            self._future = torch.futures.Future(devices=devices)
            if self._done:
                self.resolve()
            else:
                waiter.put(self)
        return self._future

    def resolve(self) -> None:
        """Hand result or error to the future."""
        if self._error is not None:
            # A BaseException cannot cross torch's futures: its text does, and Comm remembers that the round broke.
            self._future.set_exception(RuntimeError(f"round aborted: {self._error}"))
        else:
            self._future.set_result(list(self._op.outputs))


class Waiter:
    """One daemon thread that brings operations with a future to their end, in the order of their launch."""

    def __init__(self) -> None:
        """The thread starts with the first operation."""
        self._queue: queue.SimpleQueue[Held] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def put(self, held: Held) -> None:
        """Finish `held` in the background."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="resilient-waiter", daemon=True)
            self._thread.start()
        self._queue.put(held)

    def _run(self) -> None:
        while True:
            held = self._queue.get()
            held.finish()
            held.resolve()


waiter = Waiter()


class Operation:
    """What is being done: enough to launch it, to complete it in loopback, and to record it."""

    __slots__ = ("fill", "group", "index", "kind", "launch", "looped", "name", "outputs", "slot")

    def __init__(
        self,
        group: Group,
        name: str,
        outputs: Sequence[Tensor],
        launch: Callable[[Any], Any],
        fill: Callable[[], None],
        kind: str = _ECHO,
    ) -> None:
        """`launch(inner)` starts it for real, `fill()` completes it in loopback."""
        self.group, self.name, self.outputs, self.launch, self.fill, self.kind = group, name, outputs, launch, fill, kind
        self.looped = False  # Comm: a broken round may complete it in loopback (decided at the launch)
        self.index = -1  # Recorder: its number among those before the first step
        self.slot = group.slot  # its counters in the page

    def record(self) -> None:
        """It ended well."""
        if self.index >= 0:
            self.group.comm.recorder.put(self)

    @property
    def key(self) -> str:
        """Name for records and messages: group, operation, shapes."""
        shapes = ";".join(f"{t.dtype}{tuple(t.shape)}" for t in self.outputs)
        return f"{self.group.key} {self.name} {shapes}"


class Group(dist.ProcessGroup):
    """One process group as the training script sees it."""

    def __init__(self, comm: Comm, rank: int, ranks: tuple[int, ...], key: str, slot: int, kind: str) -> None:
        """rank: within the group. ranks: global ranks. key: equal on all members, unique in the run. slot: page counter. kind: inner."""
        super().__init__(rank, len(ranks))  # type: ignore[call-arg]  # the stub lacks the constructor for subclasses
        self.comm = comm
        self.ranks = ranks
        self.key = key
        self.slot = slot
        self.kind = kind
        self.inner: Inner | None = None
        self.settled = 0  # collectives before the first step that all members have behind them, as far as is known here
        self.agreed = 0  # ... as far as was known to any member when the round's groups were made
        self._rank, self._size = rank, len(ranks)
        self._name = key
        self._desc = "undefined"

    # ------------------------------------------------------------------ what torch asks of a group

    def getBackendName(self) -> str:  # noqa: N802  torch's name
        """Not plain "gloo": DDP's logger would look for gloo's own options behind that name."""
        return f"resilient-{self.kind}"

    def rank(self) -> int:
        """Rank within the group."""
        return self._rank

    def size(self) -> int:
        """Number of members."""
        return self._size

    def sit(self, rank: int) -> None:
        """From now on this process is `rank` in the group."""
        self._rank = rank

    getRank, getSize = rank, size  # noqa: N815  torch's names

    def name(self) -> str:
        """As `getBackendName`."""
        return self.getBackendName()

    def _set_group_name(self, name: str) -> None:
        self._name = name

    def _set_group_desc(self, desc: str) -> None:
        self._desc = desc

    def getGroupName(self) -> str:  # noqa: N802  torch's name
        """The name in torch's registry of groups."""
        return self._name

    def getGroupDesc(self) -> str:  # noqa: N802  torch's name
        """The description given to new_group."""
        return self._desc

    setGroupName, setGroupDesc = _set_group_name, _set_group_desc  # noqa: N815  torch's names
    group_name = property(getGroupName)
    group_desc = property(getGroupDesc)

    def abort(self) -> None:
        """Cut the inner group."""
        if self.inner is not None:
            self.inner.cut()

    shutdown = abort

    def _run(self, name: str, outputs: Sequence[Tensor], launch: Callable[[Any], Any], fill: Callable[[], None], kind: str = _ECHO) -> Held:
        op = Operation(self, name, outputs, launch, fill, kind)
        return self.comm.run(self, op)

    # ------------------------------------------------------------------ reductions

    def allreduce(self, tensors: Any, opts: Any = None, *rest: Any) -> Held:
        """In-place reduction of every tensor."""
        tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        opts = dist.AllreduceOptions() if opts is None else opts
        kind = getattr(opts, "reduceOp", opts)

        def fill() -> None:
            for tensor in tensors:
                loopback.reduce_(tensor, kind, self._size)

        return self._run("allreduce", tensors, lambda g: g.allreduce(tensors, opts, *rest), fill)

    def allreduce_coalesced(self, tensors: Any, opts: Any = None) -> Held:
        """As `allreduce`, several tensors in one message."""
        opts = dist.AllreduceCoalescedOptions() if opts is None else opts

        def fill() -> None:
            for tensor in tensors:
                loopback.reduce_(tensor, opts.reduceOp, self._size)

        return self._run("allreduce_coalesced", tensors, lambda g: g.allreduce_coalesced(tensors, opts), fill)

    def reduce(self, tensors: Any, opts: Any, *rest: Any) -> Held:
        """Reduction to one root, in place there."""
        tensors = [tensors] if isinstance(tensors, Tensor) else tensors

        def fill() -> None:
            if getattr(opts, "rootRank", self._rank) == self._rank:
                loopback.reduce_(tensors[0], getattr(opts, "reduceOp", dist.ReduceOp.SUM), self._size)

        return self._run("reduce", tensors, lambda g: g.reduce(tensors, opts, *rest), fill)

    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = None) -> Held:
        """outputs: [tensor]; inputs: [[chunk of rank 0, ...]]."""
        opts = dist.ReduceScatterOptions() if opts is None else opts

        def fill() -> None:
            for output, chunks in zip(outputs, inputs, strict=True):
                loopback.scatter_reduced(output, chunks, self._rank, opts.reduceOp)

        def launch(inner: Any) -> Any:
            return Scattered.listed(inner, outputs, inputs, opts) if self.kind == "gloo" else inner.reduce_scatter(outputs, inputs, opts)

        return self._run("reduce_scatter", outputs, launch, fill)

    def reduce_scatter_single(self, output: Tensor, flat: Tensor, opts: Any = None) -> Held:
        """output: own chunk; flat: size * output.numel() elements."""
        return self._reduce_scatter_flat("reduce_scatter_single", output, flat, opts)

    def _reduce_scatter_base(self, output: Tensor, flat: Tensor, opts: Any = None) -> Held:
        return self._reduce_scatter_flat("_reduce_scatter_base", output, flat, opts)

    def _reduce_scatter_flat(self, name: str, output: Tensor, flat: Tensor, opts: Any) -> Held:
        opts = dist.ReduceScatterOptions() if opts is None else opts

        def fill() -> None:
            loopback.scatter_reduced_flat(output, flat, self._rank, self._size, opts.reduceOp)

        def launch(inner: Any) -> Any:
            if self.kind == "gloo":
                return Scattered.flat(inner, [output], [flat], opts)
            return _spelled(inner, name)(output, flat, opts)

        return self._run("reduce_scatter_flat", [output], launch, fill)

    def reduce_scatter_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Held:
        """Several flat reduce-scatters in one message."""
        return self._reduce_scatter_many("reduce_scatter_single_coalesced", outputs, inputs, opts)

    def reduce_scatter_tensor_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Held:
        """Older spelling."""
        return self._reduce_scatter_many("reduce_scatter_tensor_coalesced", outputs, inputs, opts)

    def _reduce_scatter_many(self, name: str, outputs: Any, inputs: Any, opts: Any) -> Held:
        opts = dist.ReduceScatterOptions() if opts is None else opts
        single = "reduce_scatter_single"

        def fill() -> None:
            for output, flat in zip(outputs, inputs, strict=True):
                loopback.scatter_reduced_flat(output, flat, self._rank, self._size, opts.reduceOp)

        def launch(inner: Any) -> Any:
            if self.kind == "gloo":
                return Scattered.flat(inner, outputs, inputs, opts)
            return _coalesced(inner, name, single, outputs, inputs, opts)

        return self._run("reduce_scatter_many", outputs, launch, fill)

    # ------------------------------------------------------------------ gathering and exchange

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> Held:
        """outputs: [[slot of rank 0, ...]]; inputs: [tensor]."""
        opts = c10d.AllgatherOptions() if opts is None else opts

        def fill() -> None:
            for slots, own in zip(outputs, inputs, strict=True):
                loopback.gather(slots, own)

        flat = [slot for slots in outputs for slot in slots]
        return self._run("allgather", flat, lambda g: g.allgather(outputs, inputs, opts), fill)

    def allgather_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Held:
        """outputs: one list of tensors per rank."""
        opts = c10d.AllgatherOptions() if opts is None else opts

        def fill() -> None:
            for slots in outputs:
                for slot, own in zip(slots, inputs, strict=True):
                    slot.copy_(own)

        flat = [slot for slots in outputs for slot in slots]
        return self._run("allgather_coalesced", flat, lambda g: g.allgather_coalesced(outputs, inputs, opts), fill)

    def all_gather_single(self, output: Tensor, own: Tensor, opts: Any = None) -> Held:
        """output: size * own.numel() elements."""
        return self._allgather_flat("all_gather_single", output, own, opts)

    def _allgather_base(self, output: Tensor, own: Tensor, opts: Any = None) -> Held:
        return self._allgather_flat("_allgather_base", output, own, opts)

    def _allgather_flat(self, name: str, output: Tensor, own: Tensor, opts: Any) -> Held:
        opts = c10d.AllgatherOptions() if opts is None else opts
        return self._run(
            "allgather_flat",
            [output],
            lambda g: _spelled(g, name)(output, own, opts),
            lambda: loopback.gather_flat(output, own, self._size),
        )

    def all_gather_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Held:
        """Several flat all-gathers in one message."""
        return self._allgather_many("all_gather_single_coalesced", outputs, inputs, opts)

    def allgather_into_tensor_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Held:
        """Older spelling."""
        return self._allgather_many("allgather_into_tensor_coalesced", outputs, inputs, opts)

    def _allgather_many(self, name: str, outputs: Any, inputs: Any, opts: Any) -> Held:
        opts = c10d.AllgatherOptions() if opts is None else opts
        single = "all_gather_single"

        def fill() -> None:
            for output, own in zip(outputs, inputs, strict=True):
                loopback.gather_flat(output, own, self._size)

        return self._run("allgather_many", outputs, lambda g: _coalesced(g, name, single, outputs, inputs, opts), fill)

    def gather(self, outputs: Any, inputs: Any, opts: Any = None, *rest: Any) -> Held:
        """outputs: [[slot of rank 0, ...]] on the root, [] elsewhere."""
        opts = dist.GatherOptions() if opts is None else opts

        def fill() -> None:
            for slots, own in zip(outputs, inputs, strict=False):
                loopback.gather(slots, own)

        flat = [slot for slots in outputs for slot in slots]
        return self._run("gather", flat, lambda g: g.gather(outputs, inputs, opts, *rest), fill)

    def scatter(self, outputs: Any, inputs: Any, opts: Any = None, *rest: Any) -> Held:
        """inputs: [[chunk for rank 0, ...]] on the root, [] elsewhere."""
        opts = dist.ScatterOptions() if opts is None else opts

        def fill() -> None:
            for output, chunks in zip(outputs, inputs, strict=False):
                output.copy_(chunks[self._rank])

        return self._run("scatter", outputs, lambda g: g.scatter(outputs, inputs, opts, *rest), fill, _ECHO if inputs else _ADOPT)

    def alltoall(self, outputs: Any, inputs: Any, opts: Any = None) -> Held:
        """One chunk from and for every rank."""
        opts = dist.AllToAllOptions() if opts is None else opts

        def fill() -> None:
            loopback.exchange(outputs, inputs, self._rank)

        return self._run("alltoall", outputs, lambda g: g.alltoall(outputs, inputs, opts), fill)

    def all_to_all_single(self, output: Tensor, flat: Tensor, out_splits: Any, in_splits: Any, opts: Any = None, *rest: Any) -> Held:
        """All-to-all on one tensor, cut along dimension 0."""
        return self._alltoall_flat("all_to_all_single", output, flat, out_splits, in_splits, opts, *rest)

    def alltoall_base(self, output: Tensor, flat: Tensor, out_splits: Any, in_splits: Any, opts: Any = None, *rest: Any) -> Held:
        """Older spelling."""
        return self._alltoall_flat("alltoall_base", output, flat, out_splits, in_splits, opts, *rest)

    def _alltoall_flat(self, name: str, output: Tensor, flat: Tensor, outs: Any, ins: Any, opts: Any, *rest: Any) -> Held:
        opts = dist.AllToAllOptions() if opts is None else opts

        def fill() -> None:
            loopback.exchange_flat(output, flat, outs, ins, self._rank, self._size)

        return self._run("alltoall_flat", [output], lambda g: _spelled(g, name)(output, flat, outs, ins, opts, *rest), fill)

    # ------------------------------------------------------------------ one to many, one to one, none

    def broadcast(self, tensors: Any, opts: Any, *rest: Any) -> Held:
        """Everybody gets the root's tensor. In loopback: everybody keeps its own."""
        tensors = [tensors] if isinstance(tensors, Tensor) else tensors
        root = getattr(opts, "rootRank", opts)
        kind = _ECHO if root == self._rank else _ADOPT
        return self._run("broadcast", tensors, lambda g: g.broadcast(tensors, opts, *rest), lambda: None, kind)

    def barrier(self, opts: Any = None, *rest: Any) -> Held:
        """Nobody leaves before all have come."""
        opts = dist.BarrierOptions() if opts is None else opts
        return self._run("barrier", (), lambda g: g.barrier(opts, *rest), lambda: None, _ADOPT)

    def _speak(self, name: str, outputs: Sequence[Tensor], launch: Callable[[Any], Any], fill: Callable[[], None], peer: int) -> Held:
        """Two members alone."""
        op = Operation(self, name, outputs, launch, fill, _ADOPT if outputs else _ECHO)
        op.slot = self.comm.pair(self, peer)
        return self.comm.run(self, op)

    def send(self, tensors: Any, peer: int, tag: int) -> Held:
        """In loopback: into the void."""
        return self._speak("send", (), lambda g: g.send(tensors, peer, tag), lambda: None, peer)

    def recv(self, tensors: Any, peer: int, tag: int) -> Held:
        """In loopback: zeros."""

        def fill() -> None:
            for tensor in tensors:
                tensor.zero_()

        return self._speak("recv", tensors, lambda g: g.recv(tensors, peer, tag), fill, peer)

    def recv_anysource(self, tensors: Any, tag: int) -> Held:
        """In loopback: zeros."""

        def fill() -> None:
            for tensor in tensors:
                tensor.zero_()

        op = Operation(self, "recv", tensors, lambda g: g.recv_anysource(tensors, tag), fill, _ADOPT)
        op.slot = OVERFLOW_SLOT  # from whom, nobody knows
        return self.comm.run(self, op)
