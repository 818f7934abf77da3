"""Small models for streaming, and a fixture's helpers: what is freed on the device reads as NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload.streaming.engine import Engine
from offload.streaming.expert_cache import ExpertCache

WIDTH, VOCAB = 32, 50
POISON = 0xFF  # four such bytes are NaN in every floating dtype


class Block(nn.Module):
    """A residual block with weights of several shapes."""

    def __init__(self, width: int = WIDTH, inner: int = 2 * WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Model(nn.Module):
    """Embedding, blocks, head."""

    def __init__(self, num_blocks: int = 8, make: Callable[[int], nn.Module] = lambda i: Block()) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(make(i) for i in range(num_blocks))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def build(make: Callable[[], nn.Module] = Model, seed: int = 0) -> nn.Module:
    """The same values every time."""
    torch.manual_seed(seed)
    return make()


def tokens(num: int = 10, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (2, num), generator=torch.Generator().manual_seed(seed))


def poison_freed_places(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every place of a streaming buffer is filled with NaN when its layer is dropped; the list counts them.

    The fill is enqueued on the compute stream, behind all use of the layer and before the copy that takes the place.
    """
    counts = [0]

    def poisoned(kind: type[Engine] | type[ExpertCache]) -> None:
        real_drop = kind._drop

        def drop(loader: Any, layer: int) -> None:
            held = loader._held[layer]
            real_drop(loader, layer)
            arena = getattr(loader._source, "_arena", None)
            if arena is not None:
                loader._lanes.compute.wait(held.filled)  # perhaps it was never entered
                with torch.no_grad():
                    arena[held.offset : held.offset + loader._source._layers[layer].num_bytes].fill_(POISON)
                counts[0] += 1

        monkeypatch.setattr(kind, "_drop", drop)

    poisoned(Engine)
    poisoned(ExpertCache)
    return counts
