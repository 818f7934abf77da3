"""Train a small mixture of experts (transformers' Mixtral): most weights, and so most state, are the experts'.

transformers 5 keeps the experts of a layer in two parameters, which subgroups hold whole.
"""

from __future__ import annotations

from pathlib import Path

import torch
from devices import accelerator_or_emulated
from transformers import MixtralConfig, MixtralForCausalLM

import offload


def main() -> None:
    device = accelerator_or_emulated()
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, use_cache=False,
    )  # fmt: skip
    model = MixtralForCausalLM(config).to(device)
    optimizer = offload.AdamW(model.parameters(), lr=1e-3, device_budget="2MiB", subgroup_numel=50_000)
    text = torch.tensor(list(Path(__file__).read_bytes()))
    for step in range(12):
        begin = 64 * (step % 8)
        ids = text[begin : begin + 64][None].to(device)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        print(f"step {step:>2}: loss {loss.item():.4f}")
    print(optimizer.explain())


if __name__ == "__main__":
    main()
