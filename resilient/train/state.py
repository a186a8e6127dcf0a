"""What a run tracks: whose state is whose, where it lies, how it is put back.

Think of an orchestra's library. **Shared** state is the printed part that every player of a section has alike: parameters, optimizer
state; a newcomer copies it from a neighbour or from a snapshot. **Own** state is what one player alone has pencilled in: random number
generators, data position, module buffers (BatchNorm's statistics!), scaler, scheduler, learning rates; it is never taken from
another rank.

Contract: tensors are taken by reference, in a fixed order (`shared`). Own state is plain data, a few KB, encoded without pickle
(checkpoint/codec.py); what cannot be encoded is refused with its key. Not thread-safe: the training thread's.

  kind of object             shared                              own
  nn.Module                  parameters                          persistent buffers
  AveragedModel (gated)      parameters and buffers              -
  Optimizer                  tensors of its state                param_groups (learning rates ...), the rest of its state
  Generator                  -                                   its state
  anything with state_dict   -                                   its state_dict
  (by default)               -                                   RNG of torch, CUDA, numpy, random
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from typing import TYPE_CHECKING, Any

import msgspec
import torch
import xxhash
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from resilient.checkpoint import capture, codec
from resilient.checkpoint.layout import ALIGN, Layout, Row, decode
from resilient.errors import SnapshotMismatch, UsageError
from resilient.train import rng, twins, wrappers
from resilient.train.buffers import Buffers
from resilient.train.item import Item, item_of, local_part, oddity

if TYPE_CHECKING:
    from collections.abc import Iterator


_RNG, _GRADS, _CANARY = " rng", " grads", " canary"  # in own state, beside the names given to `track`: no keyword can be called so


class Tracked:
    """The objects given to `run.track`, by name."""

    def __init__(self) -> None:
        """Nothing yet but the random number generators."""
        self.modules: dict[str, nn.Module] = {}
        self.optimizers: dict[str, Optimizer] = {}
        self.others: dict[str, Any] = {}
        self._buffers: dict[str, Buffers] = {}  # of the modules that have own ones
        self._items: list[Item] | None = None
        self._layout: tuple[bytes, str] | None = None  # of `_items`, once somebody asked
        self._keys: dict[int, str] = {}  # id of a parameter -> its key in `shared`
        self._tied: dict[str, str] = {}  # its other names -> that key
        self._count = 0
        self.canary: float | None = None  # the canary's number for this state (train/canary.py), where it was asked
        self._values = 0
        self.twins = 1  # ranks that hold the same shared state to the last bit, this one included; known with `layout`

    def add(self, name: str, thing: Any) -> None:
        """Track `thing`. Raises UsageError if its state cannot be taken and put back."""
        if name in self.modules or name in self.optimizers or name in self.others:
            msg = f"track({name}=...): the name is already in use"
            raise UsageError(msg)
        if isinstance(thing, nn.Module):
            self.modules[name] = thing
            if not gated(thing):
                self._buffers[name] = Buffers(name, thing)
        elif isinstance(thing, Optimizer):
            self.optimizers[name] = thing
        elif isinstance(thing, torch.Generator) or all(
            callable(getattr(thing, method, None)) for method in ("state_dict", "load_state_dict")
        ):
            self.others[name] = thing
        else:
            msg = f"track({name}=...): an object with state_dict() and load_state_dict() expected, {type(thing).__name__} found"
            raise UsageError(msg)
        self._items = None

    # ------------------------------------------------------------------ shared

    def shared(self) -> list[Item]:
        """Every shared tensor, in an order that is equal on all ranks. Recomputed when optimizer state came into being."""
        count = sum(len(opt.state) for opt in self.optimizers.values())
        if self._items is None or count != self._count:
            self._items, self._count, self._layout = list(self._walk()), count, None
            self._values = self._count_values()
        return self._items

    def renew(self) -> None:
        """Forget the tensors of `shared` if one was replaced since: some optimizers make their state anew in each step."""
        if self._items is not None and (self._values != self._count_values() or any(item.outdated for item in self._items)):
            self._items = None

    def _count_values(self) -> int:
        return sum(len(state) for opt in self.optimizers.values() for state in opt.state.values())

    def _walk(self) -> Iterator[Item]:
        self._keys, self._tied = {}, {}
        seen, moved = self._keys, {id(p) for p in self.parameters()}
        for name, module in self.modules.items():
            for fqn, param in module.named_parameters(remove_duplicate=False):
                if id(param) in seen:
                    self._tied[f"{name}.{fqn}"] = seen[id(param)]
                else:
                    seen[id(param)] = f"{name}.{fqn}"
                    yield item_of(f"{name}.{fqn}", param, steady=id(param) in moved or gated(module))
            if gated(module):
                for fqn, buffer in module.named_buffers():
                    yield item_of(f"{name}.{fqn}", buffer)  # not steady: a forward in training mode moves them
        for name, optimizer in self.optimizers.items():
            for index, param in enumerate(p for group in optimizer.param_groups for p in group["params"]):
                if id(param) not in seen:
                    seen[id(param)] = f"{name}.params.{index}"
                    yield item_of(seen[id(param)], param, steady=True)
                for key, value in sorted(optimizer.state.get(param, {}).items()):
                    if isinstance(value, Tensor):
                        yield item_of(f"{name}.state.{seen[id(param)]}.{key}", value, (optimizer, param, key), steady=True)

    def layout(self) -> tuple[bytes, str]:
        """checkpoint/layout.py of `shared` as it is now, encoded, and its digest: equal digests mean that copies fit tensor by tensor."""
        self.renew()
        items = self.shared()
        if self._layout is None:
            rows = tuple(item.row() for item in items)
            alike = twins.of(self)
            self.twins = alike.count
            encoded = Layout(rows, alike, self._groups(), wrappers.prefixes(self.modules), self._tied).encode()
            self._layout = encoded, xxhash.xxh3_128_hexdigest(encoded)
        return self._layout

    def _groups(self) -> dict[str, tuple[tuple[str, ...], ...]]:
        """Per optimizer, the keys of each group's parameters."""
        return {
            name: tuple(tuple(self._keys.get(id(p), "") for p in group["params"]) for group in optimizer.param_groups)
            for name, optimizer in self.optimizers.items()
        }

    @property
    def replicated(self) -> bool:
        """Whether every rank holds the same shared state: what an optimizer moves is wrapped by DDP over all ranks."""
        wrapped = [m for root in self.modules.values() for m in root.modules() if isinstance(m, DistributedDataParallel)]
        if not wrapped or any(m.process_group.size() != torch.distributed.get_world_size() for m in wrapped):
            return False
        if torch.distributed.get_world_size() == 1:
            return False
        covered = {id(p) for m in wrapped for p in m.parameters()}
        return all(id(p) in covered for opt in self.optimizers.values() for g in opt.param_groups for p in g["params"])

    @property
    def undo_needed(self) -> bool:
        """Whether a broken step may leave shared state that only a snapshot of every step can put back."""
        return not self.replicated or len(self.optimizers) > 1 or bool(self.by_hand())

    @property
    def has_buffers(self) -> bool:
        """Whether modules have buffers that are own state (BatchNorm's statistics)."""
        return any(self._buffers.values())

    def by_hand(self) -> list[Tensor]:
        """Shared tensors that no optimizer and no gate moves: an EMA that the body updates itself, frozen layers."""
        moved = {id(p) for p in self.parameters()}
        modules = [module for module in self.modules.values() if not gated(module)]
        return [p for m in modules for p in m.parameters() if id(p) not in moved and not p.requires_grad]

    def versions(self) -> list[int]:
        """Version counters of the shared tensors: equal lists mean that nobody wrote to them in between."""
        return [item.version for item in self.shared()]

    def parameters(self) -> list[nn.Parameter]:
        """Parameters that optimizers move."""
        return [p for opt in self.optimizers.values() for group in opt.param_groups for p in group["params"]]

    def trained(self) -> list[nn.Parameter]:
        """Every parameter that may get a gradient: of tracked modules, and those only optimizers know; in an order equal on all ranks."""
        found = {id(p): p for module in self.modules.values() for p in module.parameters() if p.requires_grad}
        found.update({id(p): p for p in self.parameters()})
        return list(found.values())

    def forget_warmup(self) -> None:
        """What a step in loopback leaves behind besides state: gradients."""
        for param in self.trained():
            param.grad = None
        self.forget_scales()

    def forget_scales(self) -> None:
        """A GradScaler remembers within a step what it has unscaled; the step is over."""
        for thing in self.others.values():
            if isinstance(thing, torch.amp.GradScaler):
                thing._per_optimizer_states.clear()  # noqa: SLF001  update() does the same, and a step may end before it

    def prime(self, wanted: set[str] | None = None) -> None:
        """Bring lazily made optimizer state into being (its values are about to be overwritten), so that copies fit.

        wanted: keys of `shared` that should exist afterwards; None = of every parameter.
        """
        for name, optimizer in self.optimizers.items():
            every = [p for group in optimizer.param_groups for p in group["params"]]
            heads = {id(p): f"{name}.state.{self._keys.get(id(p), '')}." for p in every}
            params = [p for p in every if p not in optimizer.state and _wanted(p, heads[id(p)], wanted)]
            if not params:
                continue
            held = [(p, p.grad) for p in every]
            for param in every:
                param.grad = None
            rates = [group["lr"] for group in optimizer.param_groups]
            for param in params:
                param.grad = torch.zeros_like(param)
            for group in optimizer.param_groups:
                group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
            type(optimizer).step(optimizer)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            for param, grad in held:
                param.grad = grad
        self._items = None

    def expected_bytes(self) -> int:
        """Bytes of a snapshot's payload once the optimizers have made all their state.

        What is there counts; what is not yet is foretold by letting an optimizer of the same kind make one step with a tiny parameter.
        """
        items = self.shared()
        total = capture.payload_bytes(items)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                missing = [p for p in group["params"] if p.requires_grad and p not in optimizer.state]
                like, other = _state_shape(optimizer, group) if missing else (0, 0)
                local = [local_part(p) for p in missing]
                total += sum(like * (p.numel() * p.element_size() + ALIGN) + other * ALIGN for p in local)
        return total

    def expected_layout_bytes(self) -> int:
        """At least the bytes of `layout`, whether or not the optimizers have made their state: none keeps 15 tensors a parameter."""
        rows = tuple(item.row() for item in self.shared() if item.owner is None)
        return 16 * len(Layout(rows, groups=self._groups()).encode())

    def shape_like(self, layout: bytes, where: str) -> None:
        """Make or drop optimizer state until `shared` has exactly the tensors of `layout`; their values are then to be filled.

        Raises SnapshotMismatch, naming the first difference, if that cannot be.
        """
        self.renew()
        rows = decode(layout).rows
        wanted = {row.key for row in rows}
        if wanted - {item.key for item in self.shared()}:
            self.prime(wanted)
        beyond = [item for item in self.shared() if item.key not in wanted]
        for item in beyond:
            if item.owner is not None:
                optimizer, param, _ = item.owner
                optimizer.state.pop(param, None)
                self._items = None
        own = {item.key: item.row() for item in self.shared()}
        for there in rows:
            if (here := own.get(there.key)) is None:
                beside = there.key.rpartition(".")[0] + "."  # other state of the same parameter, which was dropped with it
                lacking = next((item.key for item in beyond if item.owner is not None and item.key.startswith(beside)), "")
                raise SnapshotMismatch(
                    f"{where}: {lacking} expected, which is not in it"
                    if lacking
                    else f"{where}: {there.key} found, which is not tracked here"
                )
            if there != here:
                raise SnapshotMismatch(f"{where}: {_described(here)} expected, {_described(there)} found")
        if lacking := next((item.key for item in beyond if item.key in own), ""):
            raise SnapshotMismatch(f"{where}: {lacking} expected, which is not in it")
        if list(own) != [row.key for row in rows]:
            raise SnapshotMismatch(f"{where}: its tensors stand in another order")

    # ------------------------------------------------------------------ own

    def own(self) -> bytes:
        """This rank's own state, encoded. Raises CheckpointError naming the key of anything that is not plain data."""
        present = [i for i, p in enumerate(self.trained()) if p.grad is not None]
        tree: dict[str, Any] = {_RNG: rng.take(), _GRADS: present, _CANARY: self.canary}
        for name, buffers in self._buffers.items():
            tree[name] = buffers.take()
        for name, optimizer in self.optimizers.items():
            tree[name] = _optimizer_own(optimizer)
        for name, thing in self.others.items():
            tree[name] = thing.get_state() if isinstance(thing, torch.Generator) else thing.state_dict()
        return codec.encode(tree, leaf=_leaf)

    def load_own(self, encoded: bytes) -> None:
        """Put own state back. Raises CheckpointError if it is not this rank's kind of state."""
        tree = codec.decode(encoded, leaf=_unleaf)
        wanted = {_RNG, _GRADS, _CANARY, *self.optimizers, *self.others, *self._buffers}
        if set(tree) != wanted:
            msg = f"own state: {sorted(wanted)} expected, {sorted(tree)} found"
            raise SnapshotMismatch(msg)
        for name, buffers in self._buffers.items():
            buffers.put(tree[name])
        for name, optimizer in self.optimizers.items():
            _load_optimizer_own(optimizer, tree[name])
        for name, thing in self.others.items():
            if isinstance(thing, torch.Generator):
                thing.set_state(tree[name])
            else:
                thing.load_state_dict(tree[name])
        present = set(tree[_GRADS])
        for index, param in enumerate(self.trained()):
            if index not in present:
                param.grad = None
            elif param.grad is not None:
                param.grad.zero_()
            else:
                param.grad = torch.zeros_like(param)  # an optimizer moves a parameter whose gradient is zero, and skips one without
        self.canary = tree[_CANARY]
        rng.put(tree[_RNG])  # last: a load_state_dict may have drawn numbers


def _state_shape(optimizer: Optimizer, group: dict[str, Any]) -> tuple[int, int]:
    """(tensors shaped like the parameter, other tensors) that this optimizer keeps per parameter."""
    device = group["params"][0].device
    tiny = nn.Parameter(torch.zeros(2, 2, device=device))
    tiny.grad = torch.zeros(2, 2, device=device)
    rest = {key: value for key, value in group.items() if key != "params"}
    twin = copy.copy(optimizer)
    twin.state, twin.param_groups = defaultdict(dict), [{"params": [tiny], **rest}]
    twin._optimizer_step_pre_hooks, twin._optimizer_step_post_hooks = OrderedDict(), OrderedDict()  # noqa: SLF001  the user's
    try:
        with torch.random.fork_rng(devices=[]):
            type(optimizer).step(twin)
    except (TypeError, RuntimeError):  # one that wants a closure, or sparse gradients: Adam's size; tier0 grows if that is too little
        return 2, 1
    tensors = [value for value in twin.state[tiny].values() if isinstance(value, Tensor)]
    like = sum(value.shape == tiny.shape for value in tensors)
    return like, len(tensors) - like


def _wanted(param: Tensor, head: str, wanted: set[str] | None) -> bool:
    """Whether state of this parameter is to be made."""
    return param.requires_grad if wanted is None else any(key.startswith(head) for key in wanted)


def _described(row: Row) -> str:
    return f"{row.key} {row.dtype} {list(row.local)} of {list(row.shape)}"


def gated(module: nn.Module) -> bool:
    """Whether this module changes only through a gated call: all of it is shared then."""
    return isinstance(module, AveragedModel)


def _optimizer_own(optimizer: Optimizer) -> dict[str, Any]:
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    plain = [{k: v for k, v in optimizer.state.get(p, {}).items() if not isinstance(v, Tensor)} for p in params]
    return {"groups": groups, "state": plain if any(plain) else []}


def _load_optimizer_own(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    if len(saved["groups"]) != len(optimizer.param_groups):
        counts = f"{len(optimizer.param_groups)} parameter groups expected, {len(saved['groups'])} found"
        msg = f"own state of {type(optimizer).__name__}: {counts}"
        raise SnapshotMismatch(msg)
    for group, values in zip(optimizer.param_groups, saved["groups"], strict=True):
        for key, value in values.items():
            if isinstance(group.get(key), Tensor) and isinstance(value, Tensor):
                group[key].copy_(value)
            else:
                group[key] = value
    if saved["state"]:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for param, values in zip(params, saved["state"], strict=True):
            optimizer.state[param].update(values)


def _leaf(thing: Any) -> tuple[str, bytes, memoryview] | None:
    """codec's hook: a tensor becomes (kind, header, bytes)."""
    if isinstance(thing, DTensor) or not isinstance(thing, Tensor) or oddity(thing):
        return None
    header = msgspec.msgpack.encode([str(thing.dtype).removeprefix("torch."), list(thing.shape), thing.device.type])
    flat = capture.as_bytes(thing).cpu()
    return "tensor", header, flat.numpy().data


def _unleaf(kind: str, header: bytes, data: memoryview) -> Tensor:
    if kind != "tensor":
        msg = f"own state: a tensor expected, {kind!r} found"
        raise SnapshotMismatch(msg)
    dtype, shape, device = msgspec.msgpack.decode(header)
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8) if len(data) else torch.empty(0, dtype=torch.uint8)
    return raw.view(getattr(torch, dtype)).view(shape).to(device if device == "cpu" else torch.device(device))
