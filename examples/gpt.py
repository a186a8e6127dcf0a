"""A byte-level GPT, its text and its flags: what the three training examples have in common.

Think of somebody who learns to spell by reading over a shoulder: the model sees a few lines of bytes and guesses each next one.

Contract: everything is a function of the flags. The text is read in a fixed order; the batch of a step is a function of (seed, step,
rank) alone, so a step can be done again, by whoever sits on that rank. Nothing here knows of `resilient`.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from collections.abc import Iterable

VOCABULARY = 256  # bytes
TEXT_BYTES = 4 << 20  # read in 20 ms: whoever takes an emptied chair reads it again
PIECE_BYTES = 4096
HELD_OUT = 20  # every twentieth piece of the text is kept for evaluation


# ---------------------------------------------------------------------- model


class Block(nn.Module):
    """Attention to what came before, then a small network for every place."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        """`width` is a multiple of `heads`."""
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_qkv, self.from_heads = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, context, width) -> the same."""
        batch, context, width = x.shape
        q, k, v = self.to_qkv(self.norm1(x)).view(batch, context, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True)
        x = x + self.from_heads(seen.transpose(1, 2).reshape(batch, context, width))
        more: Tensor = self.mlp(self.norm2(x))
        return x + more


class GPT(nn.Module):
    """Bytes in, the loss of guessing each next byte out."""

    def __init__(self, layers: int, width: int, heads: int, context: int, dropout: float) -> None:
        """About 12 * layers * width ** 2 parameters."""
        super().__init__()
        self.bytes = nn.Embedding(VOCABULARY, width)
        self.places = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        for name, param in self.named_parameters():
            if param.dim() > 1:
                last = name.endswith(("from_heads.weight", "mlp.2.weight"))
                nn.init.normal_(param, std=0.02 / math.sqrt(2 * layers) if last else 0.02)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """(batch, context) bytes, twice -> mean cross-entropy in nats."""
        x = self.bytes(inputs) + self.places.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


# ---------------------------------------------------------------------- text


class Text:
    """The bytes to learn from, and a part held out."""

    def __init__(self, path: str) -> None:
        """`path`: a file or a directory; "" = the Python sources of the running installation."""
        data = torch.frombuffer(bytearray(b"".join(_pieces(path))), dtype=torch.uint8)
        count = len(data) // PIECE_BYTES
        if count < HELD_OUT:
            msg = f"--data {path}: at least {HELD_OUT * PIECE_BYTES} bytes expected, {len(data)} found"
            raise SystemExit(msg)
        pieces = data[: count * PIECE_BYTES].view(count, PIECE_BYTES)
        held_out = torch.arange(count) % HELD_OUT == 0
        self.train, self.held_out = pieces[~held_out].flatten(), pieces[held_out].flatten()

    def batch(self, seed: int, step: int, rank: int, *, size: int, context: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of one step on one rank: (size, context) each."""
        return _cut(self.train, (seed * 1_000_003 + step) * 65_537 + rank, size, context)

    def test(self, number: int, *, size: int, context: int) -> tuple[Tensor, Tensor]:
        """The same out of the part that is never trained on."""
        return _cut(self.held_out, number, size, context)


def _cut(data: Tensor, seed: int, size: int, context: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)  # of its own: the global ones belong to dropout
    starts = torch.randint(len(data) - context - 1, (size, 1), generator=generator)
    rows = data[starts + torch.arange(context + 1)].long()
    return rows[:, :-1], rows[:, 1:]


def _pieces(path: str) -> Iterable[bytes]:
    root = Path(path or sysconfig.get_paths()["stdlib"])
    pattern = "*" if path else "*.py"
    files = [root] if root.is_file() else sorted(f for f in root.rglob(pattern) if f.is_file() and "site-packages" not in f.parts)
    if not files:
        msg = f"--data {root}: a file, or a directory with {pattern} in it, expected"
        raise SystemExit(msg)
    left = TEXT_BYTES
    for file in files:
        piece = file.read_bytes()[:left]
        left -= len(piece)
        yield piece
        if not left:
            return


# ---------------------------------------------------------------------- flags, and what is left at the end


def arguments(description: str) -> argparse.Namespace:
    """The flags that all examples have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--context", type=int, default=64, help="bytes that are seen at once")
    parser.add_argument("--batch", type=int, default=4, help="rows per rank and step")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="about 1 M parameters instead of 10 M: 4 layers of width 144")
    parser.add_argument("--data", default="", metavar="PATH", help="a file or a directory of text; none = Python's own sources")
    parser.add_argument("--show-every", type=int, default=10, metavar="N", help="steps between two lines about the loss")
    parser.add_argument("--digest", default="", metavar="FILE", help="write a sha256 of final weights and optimizer state there")
    args = parser.parse_args()
    if args.small:
        args.layers, args.width, args.heads = 4, 144, 4
    return args


def build(args: argparse.Namespace) -> GPT:
    """The model that the flags ask for: the same on every rank."""
    torch.manual_seed(args.seed)
    return GPT(args.layers, args.width, args.heads, args.context, args.dropout)


class Mean:
    """A running mean: state of a rank's own, for it has `state_dict` and `load_state_dict`."""

    def __init__(self) -> None:
        """Of nothing."""
        self._sum, self._count = 0.0, 0

    def add(self, value: float) -> None:
        """One more."""
        self._sum, self._count = self._sum + value, self._count + 1

    def take(self) -> float:
        """The mean so far; begins anew."""
        mean = self._sum / self._count
        self._sum, self._count = 0.0, 0
        return mean

    def state_dict(self) -> dict[str, float]:
        """Plain data."""
        return {"sum": self._sum, "count": self._count}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Put it back."""
        self._sum, self._count = state["sum"], int(state["count"])


def warm_up(step: int) -> float:
    """Factor of the learning rate: ten steps up, then constant."""
    return min(1.0, (step + 1) / 10)


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """sha256 of every weight and every tensor of optimizer state on this rank, bit by bit."""
    found = hashlib.sha256()
    for name, param in model.named_parameters():
        for key, value in [("", param), *sorted(optimizer.state.get(param, {}).items())]:
            if isinstance(value, Tensor):
                local = value.to_local() if isinstance(value, DTensor) else value
                found.update(f"{name} {key} {tuple(local.shape)}".encode())
                found.update(local.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def write_digest(file: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """What `--digest` asks for."""
    Path(file).write_text(digest(model, optimizer) + "\n", encoding="utf-8")
