"""Streaming models that do not fit: real weights in 128 MB, 1.5 billion parameters in a quarter of their bytes."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import offload
from tests.test_streaming_transformers import with_lora

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ASSETS = Path(__file__).resolve().parent.parent / ".cache" / "demo"
SMOL = ASSETS / "SmolLM2-135M-Instruct"


@pytest.fixture(autouse=True)
def large(sim: ModuleType, one_torch_thread: None) -> Iterator[None]:
    sim.configure("sync", capacity="2GiB")
    yield
    gc.collect()


def tokens_and_loss(model: Any, prompt: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy continuation of ``prompt`` (1, tokens), and the loss on ``text`` (1, tokens)."""
    with torch.no_grad():
        continued = model.generate(prompt.to("sim"), max_new_tokens=8, do_sample=False).cpu()
        return continued, model(input_ids=text.to("sim"), labels=text.to("sim")).loss.cpu()


@pytest.mark.skipif(not SMOL.exists(), reason="examples/fetch_demo_assets.py fetches the weights")
def test_smollm2_in_128_mb(sim: ModuleType) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(SMOL)
    prompt = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    text = (ASSETS / "king-james.txt").read_text(encoding="utf-8")[:4000]
    ids = torch.tensor(tokenizer(text)["input_ids"])[None, :96]

    def load() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(SMOL, dtype=torch.bfloat16).eval()

    want = tokens_and_loss(load().to("sim"), prompt, ids)
    gc.collect()
    torch.accelerator.reset_peak_memory_stats()
    model = load()
    handle = offload.stream(model, "128MB", example={"input_ids": ids, "labels": ids})
    assert torch.accelerator.memory_allocated() == handle.bill.weight_bytes
    got = tokens_and_loss(model, prompt, ids)
    used = torch.accelerator.max_memory_allocated()
    print(f"peak {used}, bill {handle.bill.device_bytes}: {handle.bill.device_bytes / used:.4f}, plan {handle.plan}")
    assert used <= handle.bill.device_bytes <= min(128e6, 1.02 * used)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert "Paris" in tokenizer.decode(got[0][0])


def test_a_qwen_of_1_5_billion_parameters_runs_and_trains_in_a_quarter_of_its_bytes(sim: ModuleType) -> None:
    config = transformers.Qwen2Config(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    num_bytes = sum(p.numel() * p.itemsize for p in model.parameters())
    assert num_bytes >= 2 * 1.5e9
    model = with_lora(model)
    torch.accelerator.reset_peak_memory_stats()
    budget = num_bytes // 4
    handle = offload.stream(model, budget, reserve="100MiB")
    assert torch.accelerator.memory_allocated() == handle.bill.weight_bytes
    ids = torch.arange(8)[None].to("sim")
    with torch.no_grad():
        assert not model(input_ids=ids).logits.isnan().any().item()
    adapters = [param for param in handle.device_parameters() if param.requires_grad]
    optimizer = offload.AdamW(adapters, lr=1e-3, plan="host")
    losses = []
    for _ in range(2):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert torch.accelerator.max_memory_allocated() <= budget
    print(f"losses {losses}, peak {torch.accelerator.max_memory_allocated()} of {budget}, plan {handle.plan}")
