"""The explanation of a layout: one line a subgroup, the bill, the plan, and the rates once measured."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import nn

import offload
from offload import Static, Stride
from tests.training import mlp, train


def params(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(64, 64, dtype=dtype, device=device)) for _ in range(3)]


def test_says_where_each_subgroup_is_updated() -> None:
    optimizer = offload.AdamW(params(torch.bfloat16), plan=Stride(2), subgroup_numel=4096)
    assert optimizer.explain() == (
        "3 subgroups, 12,288 parameters on cpu\n"
        "subgroup    parameters  dtype          state  updated on\n"
        "       0         4,096  bfloat16    48.0 KiB  CPU\n"
        "       1         4,096  bfloat16    48.0 KiB  device, state streamed\n"
        "       2         4,096  bfloat16    48.0 KiB  CPU\n"
        "memory: host state 144.0 KiB (0 B pinned), staging 32.0 KiB, "
        "device slots 96.0 KiB, resident state 0 B\n"
        "plan: D0@0 D2@1 P1@0 C0@0 G1@0 F1@0 C2@1 U0@0 U2@1"
    )


def test_says_what_is_resident_and_counts_amsgrad() -> None:
    optimizer = offload.AdamW(params(), plan=Static(0.4), subgroup_numel=4096, amsgrad=True)
    lines = optimizer.explain().splitlines()
    assert lines[2] == "       0         4,096  float32     64.0 KiB  device, state resident"
    assert "resident state 64.0 KiB" in lines[5]


def test_follows_the_plan_in_force() -> None:
    optimizer = offload.AdamW(params(), plan=Stride(1), subgroup_numel=4096)
    assert "CPU" not in optimizer.explain()
    optimizer.set_plan("D0@0 C0@0 U0@0 P1@0 G1@0 F1@0 P2@0 G2@0 F2@0")
    assert optimizer.explain().splitlines()[2].endswith("CPU")


def test_frozen_parameters_are_not_counted() -> None:
    some = params()
    some[1].requires_grad_(False)
    assert offload.AdamW(some).explain().startswith("1 subgroups, 8,192 parameters on cpu")


@pytest.mark.usefixtures("one_torch_thread")
def test_says_what_was_measured(sim: ModuleType) -> None:
    model = mlp(device="sim")
    optimizer = offload.AdamW(model.parameters(), subgroup_numel=200)
    assert "measured" not in optimizer.explain()
    train(model, optimizer, steps=range(6))
    rates = optimizer.runtime.in_force.rates
    assert rates is not None
    line = next(line for line in optimizer.explain().splitlines() if line.startswith("measured: "))
    assert f"H2D {rates.h2d_bytes_per_s / 1e9:.2f} GB/s, D2H {rates.d2h_bytes_per_s / 1e9:.2f} GB/s, CPU " in line
    assert line.endswith(f"predicted update {optimizer.simulate(rates).update_s * 1e3:.2f} ms")
