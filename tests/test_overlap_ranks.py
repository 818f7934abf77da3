"""DDP with the update under the next forward: two processes on the emulated device, the bits of the update in order."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import offload
from tests.training import assert_same_bits

NUM_RANKS, NUM_STEPS, NUM_MICRO_BATCHES = 2, 4, 2
WIDTH = 16


class Net(nn.Module):
    """In every other step one layer gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, left_out: int) -> Tensor:
        for i, layer in enumerate(self.layers):
            if i != left_out:
                x = layer(x).tanh()
        return x.square().mean()


def train(rank: int, plan: Any, overlap: Any, ddp_options: dict[str, bool]) -> tuple[list[Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    net = Net().to("sim")
    model = DistributedDataParallel(net, find_unused_parameters=True, **ddp_options)
    optimizer = offload.AdamW(net.parameters(), lr=1e-2, plan=plan, overlap=overlap, subgroup_numel=WIDTH * WIDTH)
    losses = []
    for step in range(NUM_STEPS):
        for micro_batch in range(NUM_MICRO_BATCHES):
            seed = NUM_RANKS * (NUM_MICRO_BATCHES * step + micro_batch) + rank
            x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(seed)).to("sim")
            is_last = micro_batch == NUM_MICRO_BATCHES - 1
            with nullcontext() if is_last else model.no_sync():
                loss = model(x, step if step % 2 else -1)
                loss.backward()
            losses.append(loss.detach())
        optimizer.clip_grad_norm_(0.1)
        optimizer.step()
        optimizer.zero_grad()
    optimizer.synchronize()
    return [loss.cpu() for loss in losses], {name: value.cpu() for name, value in net.state_dict().items()}


def train_on_rank(rank: int, store: str) -> None:
    from offload.testing import sim

    torch.set_num_threads(1)
    sim.load()
    dist.init_process_group("sim_gloo", init_method=f"file://{store}", rank=rank, world_size=NUM_RANKS)
    for ddp_options in ({}, {"gradient_as_bucket_view": True}):
        sim.configure("sync")
        expected = train(rank, "host", "none", ddp_options)
        for plan, executor in itertools.product(("host", "device", offload.Stride(2)), ("lazy", "random")):
            sim.configure(executor, seed=rank)
            trained = train(rank, plan, "next_forward", ddp_options)
            assert_same_bits(trained, expected, f"{ddp_options}, {plan}, {executor}")
            assert sim.races() == [], f"{ddp_options}, {plan}, {executor}"
    weights = [torch.empty_like(expected[1]["layers.0.weight"]) for _ in range(NUM_RANKS)]
    dist.all_gather(weights, expected[1]["layers.0.weight"])
    assert_same_bits(weights[0], weights[1])
    dist.destroy_process_group()


@pytest.mark.slow
def test_update_under_the_next_forward_of_ddp(sim_device: ModuleType, tmp_path: Any) -> None:
    torch.multiprocessing.spawn(train_on_rank, (str(tmp_path / "store"),), nprocs=NUM_RANKS)
