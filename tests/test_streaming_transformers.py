"""Streaming models of transformers, with peft: generation, saving, adapters, checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
from tests.test_streaming import EXECUTORS
from tests.training import assert_same_bits, snapshot

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_torch_thread", "poison")

IDS = torch.arange(1, 9)[None]
BUDGET = "350KiB"  # two of six blocks


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


def generated(model: Any) -> Tensor:
    with torch.no_grad():
        tokens: Tensor = model.eval().generate(IDS.to("sim"), max_new_tokens=6, do_sample=False, pad_token_id=0)
    return tokens.cpu()


@pytest.mark.parametrize("executor", EXECUTORS)
def test_generate_gives_the_same_tokens(sim: ModuleType, executor: str) -> None:
    want = generated(llama().to("sim"))
    sim.configure(executor)
    model = llama()
    handle = offload.stream(model, BUDGET, reserve=0, verbose=False)
    assert str(handle.plan).startswith("ssssss ")
    assert torch.equal(generated(model), want)


def test_save_pretrained_while_streaming(tmp_path: Path) -> None:
    model = llama()
    offload.stream(model, BUDGET, reserve=0, verbose=False)
    generated(model)
    model.save_pretrained(tmp_path)
    assert_same_bits(snapshot(transformers.LlamaForCausalLM.from_pretrained(tmp_path)), snapshot(llama()))


def trained(model: nn.Module, make: Callable[[nn.Module], list[torch.optim.Optimizer]], num_steps: int) -> Any:
    optimizers, losses = make(model), []
    model.train()
    for step in range(num_steps):
        ids = (IDS * (step + 3) % 100).to("sim")
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach().cpu())
    torch.accelerator.synchronize()
    return losses, snapshot(model)


def adamw(*groups: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    return [offload.AdamW(params, lr=3e-3, plan="host") for params in groups]


# Without checkpointing it is what test_streaming_training does with a model of its own.
@pytest.mark.parametrize("num_steps", [4, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_full_training_of_a_llama_has_the_same_bits(checkpointing: bool, num_steps: int) -> None:
    def make() -> Any:
        model = llama()
        if checkpointing:
            model.gradient_checkpointing_enable()
        return model

    want = trained(make().to("sim"), lambda m: adamw([*m.parameters()]), num_steps)
    model = make()
    handle = offload.stream(model, BUDGET, reserve=0, verbose=False)
    groups = handle.host_parameters(), handle.device_parameters()
    assert_same_bits(trained(model, lambda m: adamw(*groups), num_steps), want)


def with_lora(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


@pytest.mark.parametrize(
    ("when", "checkpointing"),
    [
        ("before", True),
        ("after", False),
        pytest.param("before", False, marks=pytest.mark.slow),
        pytest.param("after", True, marks=pytest.mark.slow),
    ],
)
def test_lora_before_or_after_streaming(when: str, checkpointing: bool) -> None:
    def make() -> Any:
        model = llama()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        return model

    want = trained(with_lora(make()).to("sim"), lambda m: adamw(trainable(m)), 3)
    model = make()
    if when == "before":
        model = with_lora(model)
    handle = offload.stream(model, "420KiB", reserve=0, verbose=False, resident=0)
    if when == "after":
        model = with_lora(model)
    adapters = [param for param in handle.device_parameters() if param.requires_grad]
    assert_same_bits(trained(model, lambda m: adamw(adapters), 3), want)
