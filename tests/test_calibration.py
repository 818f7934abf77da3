"""Calibration on the emulated device, whose true rates the test sets."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

import offload

NUMEL = 1 << 18


def test_link_and_latency_are_those_that_were_set(sim: ModuleType) -> None:
    sim.set_profile(h2d_bytes_per_s=3e9, d2h_bytes_per_s=2e9, latency_s=1e-5, launch_s=0)
    profile = offload.calibrate("sim", numel=NUMEL, num_ranks_per_node=2)
    assert profile.h2d_bytes_per_s == pytest.approx(3e9, rel=0.05)
    assert profile.d2h_bytes_per_s == pytest.approx(2e9, rel=0.05)
    assert profile.both_bytes_per_s == pytest.approx(2e9, rel=0.05), "full duplex: the slower direction's own"
    assert profile.copy_latency_s == pytest.approx(1e-5, rel=0.5)
    assert profile.num_ranks_per_node == 2
    assert profile.device_memory_bytes == torch.accelerator.get_memory_info()[1]


def test_every_number_says_how_it_was_got(sim: ModuleType) -> None:
    profile = offload.calibrate("sim", numel=NUMEL)
    measured = {key for key, figure in profile.figures.items() if figure.basis == "measured"}
    assert {"h2d_bytes_per_s", "host_update_params_per_s", "host_dram_bytes_per_s", "device_flops"} <= measured
    assert profile.figures["host_update_int8_params_per_s"].basis == "derived"
    assert profile.figures["num_ranks_per_node"].basis == "assumed"


def test_a_calibrated_profile_starts_an_optimizer(sim: ModuleType) -> None:
    params = [torch.nn.Parameter(torch.zeros(4096, device="sim")) for _ in range(4)]
    profile = offload.calibrate("sim", numel=NUMEL)
    optimizer = offload.AdamW(params, subgroup_numel=4096, profile=profile)
    assert optimizer.runtime.in_force.rates == offload.Rates.from_profile(profile)


@pytest.mark.parametrize("profile", ["gh200", offload.HardwareProfile.load("gh200")], ids=type)
def test_profiles_are_taken_by_name_too(sim: ModuleType, profile: object) -> None:
    params = [torch.nn.Parameter(torch.zeros(4096, device="sim")) for _ in range(4)]
    optimizer = offload.AdamW(params, subgroup_numel=4096, profile=profile)
    assert optimizer.runtime.in_force.rates == offload.Rates.from_profile(offload.HardwareProfile.load("gh200"))


def test_mistakes_are_told() -> None:
    param = [torch.nn.Parameter(torch.zeros(4))]
    with pytest.raises(ValueError, match="profile tells plan='auto' where to start, and plan is 'host'"):
        offload.AdamW(param, plan="host", profile="gh200")
    with pytest.raises(TypeError, match="profile must be a HardwareProfile"):
        offload.AdamW(param, profile=3)
    with pytest.raises(ValueError, match="numel=10 is too few to time"):
        offload.calibrate("sim", numel=10)
    with pytest.raises(ValueError, match="there is no accelerator to calibrate"):
        offload.calibrate("cpu")
