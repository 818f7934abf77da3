"""The plainest training loop: what changes in it for offloading is the line that makes the optimizer.

A small network learns to add. Without an accelerator it trains on the emulated one.
"""

from __future__ import annotations

import torch
from devices import accelerator_or_emulated
from torch import nn

import offload


def main() -> None:
    device = accelerator_or_emulated()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 1)).to(device)
    optimizer = offload.AdamW(model.parameters(), lr=1e-3, device_budget="512KiB", subgroup_numel=20_000)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=200)
    for step in range(200):
        x = torch.rand(64, 2, device=device)
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        schedule.step()
        if step % 40 == 0 or step == 199:
            print(f"step {step:>3}: loss {loss.item():.6f}")
    print(optimizer.explain())


if __name__ == "__main__":
    main()
