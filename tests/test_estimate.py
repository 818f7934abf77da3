"""Memory by formula: published sizes of models, what ZeRO shards, and budgets from a measured training."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import offload
from offload.estimate import SHAPES, TransformerShape, estimate_memory, measured_budget, parse_shape, transformer_cost
from offload.hardware import HardwareProfile
from offload.pool import MemoryBill

SMALL = TransformerShape(4, 256, 1024, 4, 2, 1000)


# ---- shapes

# Parameters as published with the models.
PUBLISHED = {
    "gpt2": 124e6, "llama-7b": 6.74e9, "llama-13b": 13.0e9, "llama-3-8b": 8.03e9, "llama-70b": 69.0e9,
    "llama-3-70b": 70.6e9, "llama-3-405b": 405.9e9, "gpt-1t": 1.008e12,
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_the_published_number_of_parameters(name: str) -> None:
    assert SHAPES[name].numel == pytest.approx(PUBLISHED[name], rel=0.01)


def test_shapes_are_read_from_text_and_from_configurations(tmp_path: Path) -> None:
    text = "num_layers=4,hidden=256,ffn=1024,num_heads=4,num_kv_heads=2,vocab=1000"
    config = {
        "num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 1000,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert parse_shape(text) == parse_shape(str(tmp_path / "config.json")) == SMALL
    assert parse_shape(text + ",gated=0,tied=1") == TransformerShape(4, 256, 1024, 4, 2, 1000, False, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("llama-8b", "no model shape 'llama-8b': give one of gpt2, llama-7b"),
        ("num_layers=4,hidden=256", "lacks ffn, num_heads, num_kv_heads, vocab"),
        ("num_layers=four", "'num_layers=four' in the model shape .* is not KEY=NUMBER"),
        ("depth=4", "'depth=4'"),
        ("num_layers=4,hidden=250,ffn=1024,num_heads=4,vocab=1000", "do not divide each other"),
        ("num_layers=0,hidden=256,ffn=1024,num_heads=4,vocab=1000", "num_layers=0 is not possible"),
        ("missing/config.json", "cannot read the model's configuration"),
    ],
)
def test_mistakes_in_shapes_are_told(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_shape(text)


def test_a_configuration_of_something_else_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 4}')
    with pytest.raises(ValueError, match="no configuration of a decoder with num_hidden_layers"):
        parse_shape(str(tmp_path / "config.json"))


# ---- by hand


def test_costs_by_hand() -> None:
    cost = transformer_cost("small", SMALL, micro_batch=2, seq=128)
    num_tokens, layer = 256, 2 * 256**2 + 2 * 256 * 128 + 3 * 256 * 1024
    forward = 2 * (4 * (layer + 512) + 1000 * 256) * num_tokens + 2 * 4 * 256 * 128 * num_tokens
    assert cost.forward_flops == forward
    assert cost.backward_flops == 3 * forward, "recomputation is a forward"
    assert cost.saved_bytes == 4 * 2 * 256 * num_tokens, "each layer's input"
    without = transformer_cost("small", SMALL, micro_batch=2, seq=128, recompute=False)
    assert without.backward_flops == 2 * forward
    assert without.saved_bytes == 4 * 2 * (6 * 256 + 2 * 128 + 4 * 1024) * num_tokens


def test_zero_shards_by_stage() -> None:
    cost = transformer_cost("llama-7b", SHAPES["llama-7b"], micro_batch=1, seq=128)
    whole = 2 * cost.numel
    sizes = {s: estimate_memory(cost, num_ranks=4, zero_stage=s) for s in range(4)}
    assert [sizes[s].grad_bytes for s in range(4)] == [whole, whole, whole // 4, whole // 4]
    assert [sizes[s].param_bytes for s in range(4)] == [whole, whole, whole, whole // 4 + whole // 32]


def test_the_bill_counts_in_every_phase() -> None:
    cost = transformer_cost("small", SMALL, micro_batch=1, seq=128)
    bare = estimate_memory(cost, fragmentation=0.0).peak_bytes
    with_bill = estimate_memory(cost, MemoryBill(slot_bytes=10**6, resident_bytes=10**7), fragmentation=0.0).peak_bytes
    assert {phase: with_bill[phase] - bare[phase] for phase in bare} == dict.fromkeys(bare, 11 * 10**6)
    assert bare["backward"] >= max(bare["forward"], bare["update"])


def test_layers_add_up_to_the_cost() -> None:
    profile = HardwareProfile.load("gh200")
    cost = transformer_cost("small", SMALL, micro_batch=1, seq=128)
    layers = cost.layers(profile, grad_bytes=4000)
    assert sum(layer.forward_s for layer in layers) == pytest.approx(cost.forward_flops / profile.device_flops)
    assert sum(layer.grad_bytes for layer in layers) == 4000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"zero_stage": 4}, "zero_stage=4 is unknown"), ({"num_ranks": 0}, "num_ranks=0 is no number of ranks")],
)
def test_mistakes_in_jobs_are_told(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate_memory(transformer_cost("small", SMALL, micro_batch=1, seq=8), **arguments)


# ---- from a measured training


def test_budget_is_what_the_fullest_phase_leaves(sim: ModuleType) -> None:
    model = nn.Sequential(nn.Linear(256, 1024), nn.Tanh(), nn.Linear(1024, 256)).to("sim")
    optimizer = offload.AdamW(model.parameters(), plan="host")
    monitor = offload.MemoryMonitor()
    monitor.attach(model, optimizer)
    for _ in range(2):
        model(torch.randn(512, 256).to("sim")).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    monitor.detach()
    budget = measured_budget(monitor, "64MiB", fragmentation=0.0)
    peak = max(p.peak_allocated_bytes or 0 for p in monitor.profile().values())
    assert 0 < peak < 64 * 2**20
    assert budget == 64 * 2**20 - peak
    assert measured_budget(monitor, "64MiB", held=MemoryBill(slot_bytes=100), fragmentation=0.0) == budget + 100
    with pytest.raises(ValueError, match="less than training took at its peak; the least that would do"):
        measured_budget(monitor, 1000)


def test_budget_needs_a_step(sim: ModuleType) -> None:
    with pytest.raises(ValueError, match="run one training step under the monitor first"):
        measured_budget(offload.MemoryMonitor(), "1GiB")
