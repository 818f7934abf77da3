"""Memory of a module that ran without memory, against the emulated device, where it ran with it."""

from __future__ import annotations

import gc
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from offload.estimate import TransformerShape, transformer_cost
from offload.tracing import trace_module

BATCH, SEQ, HIDDEN, FFN, HEADS, LAYERS, VOCAB = 2, 64, 192, 512, 4, 5, 256


class Block(nn.Module):
    """A layer as the formula has it: fused norms, attention that saves no scores, a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN, bias=False), nn.LayerNorm(HIDDEN, bias=False)
        self.query, self.key, self.value, self.out = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(HIDDEN, FFN, bias=False), nn.Linear(HIDDEN, FFN, bias=False)
        self.down = nn.Linear(FFN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        heads = [proj(y).view(*y.shape[:2], HEADS, -1).transpose(1, 2) for proj in (self.query, self.key, self.value)]
        attended = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.out(attended)
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.recompute = recompute

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
        return self.head(x)


def build(recompute: bool = False) -> nn.Module:
    return Decoder(recompute).to(torch.bfloat16)


def tokens() -> tuple[Tensor]:
    return (torch.zeros(BATCH, SEQ, dtype=torch.long),)


SHAPE = TransformerShape(LAYERS, HIDDEN, FFN, HEADS, HEADS, VOCAB)


def test_nothing_is_allocated() -> None:
    """A hundred times what this machine has."""
    cost = trace_module(lambda: nn.Sequential(nn.Linear(10**6, 10**6, bias=False)), lambda: (torch.zeros(4, 10**6),))
    assert cost.numel == 10**12
    assert cost.param_itemsize == 4


def test_saved_activations_are_those_of_the_formula() -> None:
    """Within 15 %: the formula leaves out statistics of norms and attention, embedding and loss."""
    traced = trace_module(build, tokens)
    formula = transformer_cost("formula", SHAPE, micro_batch=BATCH, seq=SEQ, recompute=False)
    assert traced.numel == pytest.approx(formula.numel, rel=0.001)
    assert traced.num_layers == LAYERS
    assert traced.saved_bytes - formula.head_bytes == pytest.approx(formula.saved_bytes, rel=0.15)
    assert traced.forward_flops == pytest.approx(formula.forward_flops, rel=0.1)
    assert traced.backward_flops == pytest.approx(formula.backward_flops, rel=0.1)


def test_recomputation_is_seen() -> None:
    kept, recomputed = trace_module(build, tokens), trace_module(lambda: build(True), tokens)
    assert recomputed.saved_bytes < kept.saved_bytes / 3
    assert recomputed.backward_flops == pytest.approx(kept.backward_flops + kept.forward_flops, rel=0.1)


@pytest.mark.parametrize("recompute", [False, True])
def test_memory_is_that_of_the_emulated_device(sim: ModuleType, recompute: bool) -> None:
    """What the allocator of a device counts when the module really runs there, but for its rounding."""
    traced = trace_module(lambda: build(recompute), tokens, device="sim")
    model = build(recompute).to("sim")
    inputs = tokens()[0].to("sim")
    gc.collect()
    resting = torch.accelerator.memory_allocated()
    loss = model(inputs).float().mean()
    saved = torch.accelerator.memory_allocated() - resting
    torch.accelerator.reset_peak_memory_stats()
    loss.backward()
    peak = torch.accelerator.max_memory_allocated()
    grads = sum(p.nbytes for p in model.parameters())
    beyond = peak - max(resting + saved, resting + grads)
    assert traced.saved_bytes == pytest.approx(saved, rel=0.01)
    assert traced.working_bytes == pytest.approx(beyond, rel=0.01)


def test_tied_parameters_count_once() -> None:
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
        model[1].weight = model[0].weight
        return model

    assert trace_module(tied, lambda: (torch.zeros(2, 8),)).numel == 64


class Peeking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x if x.sum().item() > 0 else self.weight


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Peeking, "cannot run on tensors without values"),
        (lambda: nn.Linear(4, 4).requires_grad_(False), "has no trainable parameter"),
        (lambda: nn.Linear(5, 4), "cannot run on tensors without values"),
    ],
)
def test_what_cannot_be_traced_is_told(module: type[nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trace_module(module, lambda: (torch.zeros(4),), name="mine")
