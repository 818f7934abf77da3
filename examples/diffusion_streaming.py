"""A diffusion transformer whose weights do not fit: trained, then sampled from, while its blocks stream to the device.

Blocks are those of DiT (Peebles and Xie, arXiv 2212.09748): attention and an MLP whose norms the time step scales and
shifts. It learns to draw a bright diagonal, by predicting the noise that was added to it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from devices import accelerator_or_emulated
from torch import Tensor, nn

import offload

WIDTH, NUM_BLOCKS, SIZE, NUM_TIMES = 64, 8, 8, 50
DEVICE_BUDGET = "600KiB"  # of some 1.9 MiB of weights


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.modulation = nn.Linear(WIDTH, 4 * WIDTH)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale, shift_mlp, scale_mlp = self.modulation(F.silu(time))[:, None].chunk(4, dim=-1)
        q, k, v = self.qkv(self.norm(x) * (1 + scale) + shift).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm(x) * (1 + scale_mlp) + shift_mlp)


class DiT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(SIZE, WIDTH), nn.Parameter(0.02 * torch.randn(SIZE, WIDTH))
        self.time = nn.Embedding(NUM_TIMES, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(NUM_BLOCKS))
        self.head = nn.Linear(WIDTH, SIZE)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Predicted noise of ``x`` (batch, SIZE rows, SIZE pixels) at ``time`` (batch,)."""
        x, t = self.embed(x) + self.place, self.time(time)
        for block in self.blocks:
            x = block(x, t)
        return self.head(x)


def main() -> None:
    device = accelerator_or_emulated()
    torch.manual_seed(0)
    model = DiT()
    handle = offload.stream(model, device_budget=DEVICE_BUDGET, reserve=0)
    print(handle.plan)
    # One for the weights that stream, whose gradients arrive in host memory, and one for those that stay.
    optimizers = [offload.AdamW(params, lr=2e-3) for params in (handle.host_parameters(), handle.device_parameters())]
    kept = torch.linspace(0.99, 0.01, NUM_TIMES, device=device)  # of the picture's variance, at each time
    picture = 2 * torch.eye(SIZE, device=device) - 1
    for step in range(120):
        time = torch.randint(0, NUM_TIMES, (16,)).to(device)
        noise = torch.randn(16, SIZE, SIZE).to(device)
        signal = kept[time].view(-1, 1, 1)
        loss = (model(signal.sqrt() * picture + (1 - signal).sqrt() * noise, time) - noise).square().mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        if step % 20 == 0 or step == 119:
            print(f"step {step:>3}: loss {loss.item():.4f}")
    with torch.no_grad():
        x = torch.randn(1, SIZE, SIZE).to(device)
        for now in range(NUM_TIMES - 1, 0, -5):  # DDIM: to the predicted picture, with as much noise as the next time
            noise = model(x, torch.full((1,), now, device=device))
            clean = (x - (1 - kept[now]).sqrt() * noise) / kept[now].sqrt()
            x = kept[max(now - 5, 0)].sqrt() * clean + (1 - kept[max(now - 5, 0)]).sqrt() * noise
    print(f"the sample differs from the picture by {(x - picture).abs().mean().item():.3f} a pixel")
    handle.remove()


if __name__ == "__main__":
    main()
