"""What calls take beside weights is predicted: the bill is what the device's allocator sees, and the budget is kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
from tests.streaming_models import Model, build, tokens
from tests.test_streaming_experts import FusedExperts, SeparateExperts
from tests.test_streaming_experts import mixture as mixture_of
from tests.test_streaming_training import loss_of

pytestmark = pytest.mark.usefixtures("one_torch_thread", "sim")

IDS = torch.arange(1, 241).view(2, 120)
BUDGET = 4_600_000


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=300, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@torch.no_grad()
def call(model: Any) -> None:
    model(input_ids=IDS.to("sim"), use_cache=False)


def generate(model: Any) -> None:
    ids = IDS.to("sim")
    model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, pad_token_id=0
    )


def step(model: Any) -> None:
    ids = IDS.to("sim")
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    model.zero_grad()


def adapted() -> Any:
    from tests.test_streaming_transformers import with_lora

    return with_lora(llama()).train()


def mixture() -> Any:
    """Experts whose activations are most of what a call takes, and a router that sends all tokens to the same ones."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(
        hidden_size=32, moe_intermediate_size=2048, shared_expert_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, vocab_size=300,
    )  # fmt: skip
    model = transformers.Qwen2MoeForCausalLM(config)
    for name, param in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            nn.init.zeros_(param)
    return model.requires_grad_(False).eval()


def adapted_mixture() -> Any:
    from tests.test_streaming_transformers import with_lora

    return with_lora(mixture()).train()


BATCH = {"input_ids": IDS, "labels": IDS}
PROMPT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
CASES = {
    "call": (llama, call, BUDGET, {"example": {"input_ids": IDS, "use_cache": False}}),
    "generate": (llama, generate, BUDGET, {"example": PROMPT, "new_tokens": 6}),
    "adapters": (adapted, step, 16_000_000, {"example": BATCH}),
    "mixture": (mixture, call, 13_000_000, {"example": {"input_ids": IDS, "use_cache": False}, "resident": 0}),
    "adapted mixture": (adapted_mixture, step, 36_000_000, {"example": BATCH, "resident": 0}),
    "full": (lambda: llama().train(), step, 21_500_000, {"example": BATCH}),
}
SLOW = ("call", "adapters", "adapted mixture")
MOSTLY_SLOW = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES]


@pytest.mark.parametrize("case", MOSTLY_SLOW)
def test_the_bill_is_what_is_used(case: str) -> None:
    make, run, budget, kwargs = CASES[case]
    model = make()
    torch.accelerator.reset_peak_memory_stats()
    handle = offload.stream(model, budget, verbose=False, **kwargs)
    assert handle.plan.streamed
    assert handle.plan.resident or handle.plan.window > 1
    for _ in range(2):
        run(model)
    torch.accelerator.synchronize()
    used = torch.accelerator.max_memory_allocated()
    assert used <= handle.bill.device_bytes <= budget
    assert handle.bill.device_bytes <= 1.02 * used


@pytest.mark.parametrize("make", [pytest.param(FusedExperts, marks=pytest.mark.slow), SeparateExperts])
def test_no_routing_of_a_mixture_takes_more(make: type) -> None:
    def used(spread: float) -> tuple[int, int]:
        model, ids = build(mixture_of(make)), tokens(40)
        for layer in model.layers:
            layer.router.weight.mul_(spread)
        torch.accelerator.reset_peak_memory_stats()
        handle = offload.stream(model, "1MiB", example=(ids,), verbose=False)
        with torch.no_grad():
            model(ids.to("sim"))
        torch.accelerator.synchronize()
        handle.remove()
        return torch.accelerator.max_memory_allocated(), handle.bill.device_bytes

    (spread_out, bill), (together, same_bill) = used(1.0), used(0.0)
    assert bill == same_bill
    assert spread_out < together <= bill <= 1.02 * together


def test_arguments_in_order_and_the_model_is_left_alone() -> None:
    model = build()
    before = {name: (id(p), p.device.type) for name, p in model.named_parameters()}
    with pytest.raises(offload.BudgetError, match="reserve"):
        offload.stream(model, 50_000, example=(tokens(200),), verbose=False)
    assert {name: (id(p), p.device.type) for name, p in model.named_parameters()} == before
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
    handle = offload.stream(model, "4MiB", example=(tokens(200),), verbose=False)
    torch.accelerator.reset_peak_memory_stats()
    loss_of(model, 0).backward()
    assert torch.accelerator.max_memory_allocated() <= handle.bill.device_bytes


def test_gradients_of_streamed_weights_do_not_stay() -> None:
    """With few tokens, those of all blocks together would be most of what is taken."""
    model, ids = build(lambda: Model(24)), tokens(2)
    torch.accelerator.reset_peak_memory_stats()
    handle = offload.stream(model, "1MiB", example=(ids,), resident=0, verbose=False)
    output = model(ids.to("sim"))
    output.mean().backward()
    used = torch.accelerator.max_memory_allocated()
    assert used <= handle.bill.device_bytes <= 1.02 * used


class LooksAtValues(Model):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * (2 if tokens.sum().item() > 0 else 1)


@pytest.mark.parametrize(
    ("make", "kwargs", "message"),
    [
        (LooksAtValues, {"example": (tokens(),)}, "give reserve=bytes instead"),
        (Model, {"example": (tokens(), 3)}, "cannot be called with this example"),
        (Model, {"example": {}}, "example has no tensors"),
        (Model, {"example": (tokens(),), "new_tokens": 3}, "an example with input_ids"),
        (Model, {"new_tokens": 3}, "continue an example"),
        (Model, {"example": (tokens(),), "reserve": 5}, "not both"),
    ],
)
def test_what_is_refused(make: Callable[[], nn.Module], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        offload.stream(build(make), "1MiB", verbose=False, **kwargs)


def test_a_margin_is_counted(sim: ModuleType) -> None:
    """One call of known size: its argument, then one activation of a multiple of the allocator's unit."""
    from offload.streaming.activations import Workload, activations

    model = nn.Linear(128, 256, bias=False)
    taken = activations(model, torch.device("sim"), Workload((torch.zeros(64, 128),)), passing=[])
    assert taken.peak_bytes == math.ceil(1.02 * (64 * 128 + 64 * 256) * 4)
