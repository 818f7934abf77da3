"""Flat parameters cut into subgroups over state in one piece."""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed")

from offload import Static
from offload.arguments import parse_options
from offload.integrations.deepspeed.partition import FlatPartition, cuts, default_subgroup_numel
from offload.kernels import AdamScalars
from tests.training import assert_same_bits


def options(**given: Any) -> Any:
    names = ("plan", "device_budget", "host_budget", "pinned_budget", "subgroup_numel", "num_slots")
    return parse_options(**{**dict.fromkeys(names), "plan": "auto", **given})


@pytest.mark.parametrize(("numel", "max_numel"), list(itertools.product((1, 63, 64, 1000, 4097), (1, 64, 500, 10**9))))
def test_cuts_cover_everything_once_and_are_aligned(numel: int, max_numel: int) -> None:
    found = cuts(numel, max_numel)
    assert [begin for begin, _ in found] == [0, *itertools.accumulate(length for _, length in found)][:-1]
    assert sum(length for _, length in found) == numel
    assert all(begin % 64 == 0 for begin, _ in found)
    assert all(0 < length <= max(max_numel, 64) + 64 for _, length in found)


def test_a_partition_is_cut_into_a_couple_of_dozen_unless_it_is_small() -> None:
    assert default_subgroup_numel(24 * 10**8, 10**9) == 10**8
    assert default_subgroup_numel(10**6, 10**9) == 2**20
    assert default_subgroup_numel(24 * 10**8, 10**7) == 10**7


@pytest.mark.parametrize("plan", ["host", "device", "auto"])
def test_cut_and_whole_give_the_same_bits(sim: ModuleType, plan: str) -> None:
    """State in one piece goes to the device row by row, without making the host wait."""
    sim.configure("random")
    found = []
    for max_numel in (None, 200):
        flats = [torch.linspace(-1, 1, numel).bfloat16().to("sim") for numel in (999, 130)]
        partition = FlatPartition(flats, options(plan=plan), max_subgroup_numel=max_numel)
        for step in (1, 2, 3):
            scalars = AdamScalars.at_step(
                lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, step=step, decoupled=True
            )
            partition.step([flat * step for flat in flats], [scalars, scalars])
        partition.synchronize()
        found.append([*(flat.cpu() for flat in flats), *(state.clone() for state in partition.states)])
    assert_same_bits(found[1], found[0])
    assert sim.races() == []


def test_budgets_hold_for_state_in_one_piece(sim: ModuleType) -> None:
    flat = torch.zeros(1024, device="sim")
    few = FlatPartition([flat], options(pinned_budget=4 * 4096), max_subgroup_numel=256)  # staging, by the page
    assert (few.bill.pinned_state_bytes, few.bill.slot_bytes) == (0, 0)  # so every update is the CPU's
    one = FlatPartition([flat], options(device_budget=12 * 256), max_subgroup_numel=256)
    assert (len(one.runtime.homes.residents), one.runtime.homes.num_slots) == (0, 1)
    none = FlatPartition([flat], options(device_budget=100), max_subgroup_numel=256)
    assert none.bill.device_bytes == 0
    with pytest.raises(ValueError, match="keeps state on the device"):
        FlatPartition([flat], options(plan=Static(0.5)), max_subgroup_numel=256)
