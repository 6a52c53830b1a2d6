"""A byte-level GPT on the sources of Python's own standard library: no download, and the same on every machine with the
same Python."""

import sysconfig
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedflow.local import TorchWorkload

CONTEXT = 64
HELD_OUT = 20  # every twentieth file is seen by no site


@cache
def sources(megabytes: float = 4.0) -> tuple[bytes, ...]:
    """The standard library's modules, in alphabetical order, as far as `megabytes` go."""
    found, left = [], int(megabytes * 1e6)
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        data = path.read_bytes()[:left]
        left -= len(data)
        if data:
            found.append(data)
    return tuple(found)


def windows(files: Iterable[bytes]) -> Tensor:
    """(N, CONTEXT + 1) bytes: inputs, and one further as targets."""
    text = torch.frombuffer(bytearray(b"".join(files)), dtype=torch.uint8)
    return text[: len(text) // (CONTEXT + 1) * (CONTEXT + 1)].reshape(-1, CONTEXT + 1)


class Sources(TorchWorkload):
    """One site's files: of the n sites, site i has every nth file from the ith. pooled: one site has all of them."""

    def __init__(self, site: str, sites: list[str], megabytes: float = 4.0, pooled: bool = False) -> None:
        files = [data for i, data in enumerate(sources(megabytes)) if i % HELD_OUT]
        self.rows = windows(files if pooled else files[sites.index(site) :: len(sites)])

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterable[Tensor]:
        for rows in torch.split(torch.randperm(len(self.rows), generator=generator), batch_size):
            yield self.rows[rows].long()

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        logits = model(batch[:, :-1])  # (batch, CONTEXT, 256)
        return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


class HeldOut(Sources):
    """Windows of files that no site has, at the server."""

    def __init__(self, megabytes: float = 4.0, examples: int = 512) -> None:
        rows = windows(data for i, data in enumerate(sources(megabytes)) if not i % HELD_OUT)
        self.rows = rows[:: max(1, len(rows) // examples)][:examples]

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        losses = [float(self.loss(model, part.long())) * len(part) for part in self.rows.split(128)]
        loss = sum(losses) / len(self.rows)
        return {"loss": loss, "bits_per_byte": loss / 0.6931471805599453}


class Block(nn.Module):
    """Causal self-attention and a two-layer perceptron, each after a norm and beside a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        parts = self.qkv(self.norm1(x)).reshape(batch, time, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)  # each (batch, heads, time, width / heads)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class ByteGPT(nn.Module):
    """119 thousand parameters by default: two blocks over 64 numbers a byte; the last layer is the embedding's transpose."""

    def __init__(self, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        x = self.embedding(text) + self.position[: text.shape[1]]
        return self.norm(self.blocks(x)) @ self.embedding.weight.T
