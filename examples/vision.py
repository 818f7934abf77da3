"""Train a vision transformer (transformers' ViT) from random weights to tell bright squares from dark ones."""

from __future__ import annotations

import torch
from devices import accelerator_or_emulated
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

import offload


def images(num: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(num, 3, 32, 32) of noise with a square that is bright or dark, and which it is."""
    labels = torch.randint(0, 2, (num,))
    pixels = 0.1 * torch.randn(num, 3, 32, 32)
    pixels[:, :, 8:24, 8:24] += (2.0 * labels - 1.0).view(-1, 1, 1, 1)
    return pixels.to(device), labels.to(device)


def main() -> None:
    device = accelerator_or_emulated()
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=8,
        num_labels=2,
    )  # fmt: skip
    model = ViTForImageClassification(config).to(device)
    optimizer = offload.AdamW(model.parameters(), lr=1e-3, device_budget="1MiB", subgroup_numel=20_000)
    for step in range(12):
        pixels, labels = images(16, device)
        output = model(pixel_values=pixels, labels=labels)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        right = (output.logits.argmax(-1) == labels).sum().item()
        print(f"step {step:>2}: loss {output.loss.item():.4f}, {right} of 16 right")


if __name__ == "__main__":
    main()
