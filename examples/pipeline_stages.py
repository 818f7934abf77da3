"""Two pipeline stages of torch.distributed.pipelining, each with an optimizer of its own. Starts its ranks itself.

``torchrun --nproc-per-node 2 examples/pipeline_stages.py`` does the same.
"""

from __future__ import annotations

import os
import subprocess
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

import offload

NUM_STAGES, NUM_MICROBATCHES, BATCH, WIDTH = 2, 4, 16, 32


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4)))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(step))
    return x, x.flip(1).tanh()


def train_stage(num_steps: int) -> tuple[list[float], list[torch.Tensor]]:
    """Losses (on the last rank) and the weights of this rank's stage."""
    rank = dist.get_rank()
    per_stage = len(layers()) // NUM_STAGES
    module = layers()[rank * per_stage : (rank + 1) * per_stage]
    stage = PipelineStage(module, rank, NUM_STAGES, torch.device("cpu"))
    schedule = Schedule1F1B(stage, NUM_MICROBATCHES, loss_fn=nn.functional.mse_loss)
    optimizer = offload.AdamW(module.parameters(), lr=1e-2)
    means = []
    for step in range(num_steps):
        x, target = batch(step)
        losses: list[torch.Tensor] = []
        optimizer.zero_grad()
        if rank == 0:
            schedule.step(x)
        else:
            schedule.step(target=target, losses=losses)
            means.append(torch.stack(losses).mean().item())
        optimizer.step()
    return means, [param.detach().clone() for param in module.parameters()]


def main() -> None:
    if "RANK" not in os.environ:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_STAGES}"]
        raise SystemExit(subprocess.run([*command, __file__], check=False).returncode)
    dist.init_process_group("gloo")
    losses, _ = train_stage(num_steps=10)
    if losses:
        print("loss:", " ".join(f"{loss:.4f}" for loss in losses))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
