"""Rates of a profile, and what prediction makes of shared links, shared memory and ranks. Update times by hand are in
test_planner."""

from __future__ import annotations

import math

import pytest

from offload.executor import run_update
from offload.hardware import HardwareProfile
from offload.lanes.virtual import VirtualMachine
from offload.perf_model import Predictor, Rates, predict
from offload.plan import Placement, Plan, lower
from offload.subgroup import Slot, Staging, Subgroup

HOST, DEVICE = Placement.HOST, Placement.DEVICE


def equal_subgroups(num: int, numel: int = 1000) -> list[Subgroup]:
    return [Subgroup(i, numel, 2 * numel, 12 * numel) for i in range(num)]


def test_every_rate_of_a_profile_is_used() -> None:
    profile = HardwareProfile.load("h100-sxm-node")
    rates = Rates.from_profile(profile)
    for name in Rates.__slots__:
        assert getattr(rates, name) == getattr(profile, name)


@pytest.mark.parametrize("state_format", ["fp32", "split16", "bf16", "int8"])
def test_state_format_chooses_the_rate_of_the_cpu(state_format: str) -> None:
    profile = HardwareProfile.load("rtx4090-desktop")
    rates = Rates.from_profile(profile, state_format=state_format)
    assert rates.host_update_params_per_s == profile.host_update_rate(state_format)


def test_fewer_ranks_have_more_of_the_host_each() -> None:
    profile = HardwareProfile.load("h100-sxm-node")
    all_of_them, half = Rates.from_profile(profile), Rates.from_profile(profile, num_ranks=4)
    assert half.host_dram_bytes_per_s == 2 * all_of_them.host_dram_bytes_per_s
    assert half.host_update_params_per_s == 2 * all_of_them.host_update_params_per_s
    assert half.h2d_bytes_per_s == all_of_them.h2d_bytes_per_s


def test_profile_stands_for_its_rates() -> None:
    profile, plan = HardwareProfile.load("gh200"), lower([HOST, DEVICE] * 3, num_slots=2, num_staging=2)
    from_profile = predict(plan, equal_subgroups(6), profile)
    from_rates = predict(plan, equal_subgroups(6), Rates.from_profile(profile))
    assert from_profile == from_rates
    assert from_profile.spans == from_rates.spans


def test_predictor_starts_each_plan_from_idle_lanes() -> None:
    rates, subgroups = Rates(2.0, 3.0, 1 / 5, 1 / 2), equal_subgroups(4, numel=1)
    plans = [lower(where, num_slots=2, num_staging=1) for where in ([HOST, DEVICE] * 2, [DEVICE] * 4, [HOST] * 4)]
    predictor = Predictor(subgroups, rates)
    for plan in (*plans, *reversed(plans)):
        assert predictor.predict(plan) == predict(plan, subgroups, rates)


def test_directions_share_a_link_that_is_not_full_duplex() -> None:
    """P1 6 s of work beside F0: from 8 s on both run at half rate, and end together."""
    rates = Rates(2.0, 2.0, 1 / 5, 1 / 2, both_bytes_per_s=1.0)
    prediction = predict(Plan.parse("P0@0 P1@1 G0@0 F0@0 G1@1 F1@1"), equal_subgroups(2, numel=1), rates)
    spans = {span.name: (span.start_s, span.end_s) for span in prediction.spans}
    assert spans["P0@0"] == (0, 6)
    # Alone from 6 to 8; then both at half rate until P1's 4 s are done at 16; F0 has 2 s left then.
    assert spans["P1@1"] == (6, 16)
    assert spans["F0@0"] == (8, 18)
    assert spans["F1@1"] == (18, 24)


def test_cpu_update_and_copies_share_host_memory() -> None:
    """C0 asks for 28 bytes in 5 s, P1 for 12 bytes in 6 s: 7.6 bytes/s of which there are 3.8, until both are done."""
    rates = Rates(2.0, math.inf, 1 / 5, math.inf, host_dram_bytes_per_s=3.8)
    prediction = predict(Plan.parse("D0@0 P1@0 C0@0 G1@0 F1@0 U0@0"), equal_subgroups(2, numel=1), rates)
    spans = {span.name: (span.start_s, span.end_s) for span in prediction.spans}
    assert spans["C0@0"] == (0, pytest.approx(10))
    assert spans["P1@0"] == (0, pytest.approx(10 + 1 * 1))


def test_copied_bytes_weigh_in_host_memory_as_the_profile_says() -> None:
    plan, one = Plan.parse("P0@0 G0@0 F0@0"), equal_subgroups(1, numel=1)
    light = Rates(2.0, 2.0, 1.0, math.inf, host_dram_bytes_per_s=1.0)
    heavy = Rates(2.0, 2.0, 1.0, math.inf, host_dram_bytes_per_s=1.0, host_bytes_per_h2d_byte=3.0)
    assert predict(plan, one, light).update_s == 12 + 12
    assert predict(plan, one, heavy).update_s == 36 + 12


def test_parameters_are_ready_before_states_are_flushed() -> None:
    prediction = predict(Plan.parse("P0@0 G0@0 F0@0"), equal_subgroups(1, numel=1), Rates(2.0, 2.0, 1 / 5, 1 / 2))
    assert (prediction.params_ready_s, prediction.update_s) == (8, 14)
    prediction = predict(Plan.parse("D0@0 C0@0 U0@0"), equal_subgroups(1, numel=1), Rates(2.0, 2.0, 1 / 5, 1 / 2))
    assert prediction.params_ready_s == prediction.update_s == 7


def test_launches_cost_their_latency() -> None:
    rates = Rates(2.0, 2.0, 1 / 5, 1 / 2, launch_latency_s=0.25)
    assert predict(Plan.parse("R0 R1"), equal_subgroups(2, numel=1), rates).update_s == 2 * 2.25


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_in_step_take_as_long_as_one_with_its_share(num_ranks: int) -> None:
    """One machine with all ranks' lanes and the whole memory, against one rank with its share of it."""
    profile = HardwareProfile.load("dos-h100")
    plan = lower([HOST, DEVICE, DEVICE, HOST, HOST, DEVICE], num_slots=2, num_staging=2)
    rates = Rates.from_profile(profile, num_ranks=num_ranks)
    machine = VirtualMachine(rates.host_dram_bytes_per_s * num_ranks)
    for _ in range(num_ranks):
        slots, stagings = [Slot(0), Slot(1)], [Staging(0), Staging(1)]
        run_update(plan, equal_subgroups(6, 10**8), slots, stagings, rates.lanes(machine))
    assert machine.run() == pytest.approx(predict(plan, equal_subgroups(6, 10**8), rates).update_s)
