"""Closed-form bounds: the formulas by hand, and no prediction below them."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.bounds import Load, Update, all_device_bound, all_host_bound, best_split, bound_of, plan_bound
from offload.hardware import HardwareProfile
from offload.perf_model import Rates, predict
from offload.plan import Placement, Plan, lower
from offload.subgroup import Subgroup

N = 1e9


def rates(*, up: float = 1e12, down: float = 1e12, cores: float = 1e15, memory: float = math.inf,
          both: float = math.inf) -> Rates:  # fmt: skip
    return Rates(up, down, cores, 1e15, both_bytes_per_s=both, host_dram_bytes_per_s=memory)


def test_all_host() -> None:
    link_and_cores = rates(up=50e9, down=50e9, cores=2e9)
    assert all_host_bound(Update(N), link_and_cores).seconds == N / 2e9
    assert all_host_bound(Update(N), link_and_cores).binds == "cores"
    assert all_host_bound(Update(N), rates(memory=60e9)).seconds == pytest.approx(N * 32 / 60e9)
    assert all_host_bound(Update(N, gradients_on_host=True), rates(memory=60e9)).seconds == N * 30 / 60e9
    assert all_host_bound(Update(N), rates(up=1e9)).seconds == N * 2 / 1e9


def test_all_device() -> None:
    assert all_device_bound(Update(N), rates(up=50e9, down=50e9, memory=120e9)).seconds == N * 12 / 50e9
    in_memory = all_device_bound(Update(N), rates(up=53e9, down=53e9, memory=62e9))
    assert in_memory.seconds == pytest.approx(N * 24 / 62e9)
    assert in_memory.binds == "host memory"


@pytest.mark.parametrize(("link", "cores"), [(100e9, 2e9), (25e9, 2e9), (12e9, 2e9), (6e9, 2.9e9)])
def test_best_split_where_cores_and_link_bind(link: float, cores: float) -> None:
    share, bound = best_split(Update(N), rates(up=link, down=link, cores=cores))
    assert share == pytest.approx((link - 2 * cores) / (link + 10 * cores), abs=1e-9)
    assert bound.seconds == pytest.approx(12 * N / (link + 10 * cores), rel=1e-9)


def test_best_split_where_memory_binds_is_all_on_the_device() -> None:
    """Its traffic is 24 bytes a parameter where the CPU's is 30: at most 1.25 times faster, whatever the link."""
    machine = rates(memory=62e9, cores=1e10)
    share, bound = best_split(Update(N, gradients_on_host=True), machine)
    assert share == pytest.approx(1.0)
    all_host = all_host_bound(Update(N, gradients_on_host=True), machine)
    assert all_host.seconds / bound.seconds == pytest.approx(30 / 24)


@pytest.mark.parametrize(("up", "down"), [(25e9, 40e9), (40e9, 25e9)])
def test_the_slower_direction_sets_the_best_split(up: float, down: float) -> None:
    share, bound = best_split(Update(N), rates(up=up, down=down, cores=2e9))
    assert share == pytest.approx((25e9 - 4e9) / (25e9 + 20e9))
    assert bound.seconds == pytest.approx(12 * N / (25e9 + 20e9))


def test_directions_that_bind_unequal_bytes() -> None:
    """Gradients came down before: host updates use the way up only. 30 GB/s up alone, 20 each way together."""
    machine = rates(up=30e9, down=30e9, both=20e9, cores=2e9)
    share, bound = best_split(Update(N, gradients_on_host=True), machine)
    # 12x down beside 12x up at 20 GB/s, the other 2(1-x) up at 30, while the cores do 1-x at 2e9 a second.
    assert share == pytest.approx((1 / 2 - 2 / 30) / (1 / 2 - 2 / 30 + 12 / 20))
    assert bound.seconds_of["link up"] == pytest.approx(bound.seconds_of["cores"]) == pytest.approx(bound.seconds)


RATE = st.floats(0.05, 20.0)


@settings(max_examples=200, deadline=None)
@given(up=RATE, down=RATE, both=RATE, cores=RATE, device=RATE, memory=RATE, on_host=st.booleans(), wide=st.booleans())
def test_best_split_is_that_of_brute_force(
    up: float, down: float, both: float, cores: float, device: float, memory: float, on_host: bool, wide: bool
) -> None:
    machine = Rates(up, down, cores, device, both_bytes_per_s=both, host_dram_bytes_per_s=10 * memory)
    update = Update(1.0, param_bytes=4.0 if wide else 2.0, gradients_on_host=on_host)
    share, bound = best_split(update, machine)
    tried = [bound_of(update.load(i / 500), machine).seconds for i in range(501)]
    assert 0 <= share <= 1
    assert bound.seconds == pytest.approx(bound_of(update.load(share), machine).seconds)
    assert bound.seconds <= min(tried) * (1 + 1e-9)
    steepest = 500 * max(abs(after - before) for before, after in itertools.pairwise(tried))
    assert bound.seconds >= min(tried) - steepest / 500


def test_best_split_of_a_fast_cpu_moves_nothing() -> None:
    assert best_split(Update(N), rates(up=1e9, down=1e9))[0] == 0.0


def test_both_directions_of_a_slow_duplex_link() -> None:
    """Up 10 bytes/s, down 20 alone, 8 each way together; 8 bytes cross both ways, the other 10 at 10 bytes/s."""
    seconds = bound_of(Load(up_bytes=18, down_bytes=8), rates(up=10.0, down=20.0, both=8.0)).seconds_of
    assert seconds["link up"] == 8 / 8 + 10 / 10
    assert seconds["link down"] == 8 / 8
    # Where both together are slower than in turns, turns bound the time.
    seconds = bound_of(Load(up_bytes=18, down_bytes=8), rates(up=10.0, down=20.0, both=4.0)).seconds_of
    assert seconds["link up"] == pytest.approx(18 / 10 + 8 / 20)


def test_load_of_a_plan() -> None:
    plan = Plan.parse("D0@0 P1@0 C0@0 G1@0 F1@0 U0@0 R2")
    subgroups = [Subgroup(i, 10, 20, 120) for i in range(3)]
    ones = Rates(1.0, 1.0, 1.0, 1.0, host_dram_bytes_per_s=1.0)
    assert plan_bound(plan, subgroups, ones).seconds_of == {
        "link up": 120 + 20, "link down": 120 + 20, "host memory": 2 * (120 + 20) + 2 * (120 + 20), "cores": 10,
        "device": 20,
    }  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_prediction_beats_the_bound_of_its_plan(data: st.DataObject) -> None:
    rate = st.floats(0.1, 10.0)
    machine = Rates(
        data.draw(rate), data.draw(rate), data.draw(rate), data.draw(rate),
        both_bytes_per_s=data.draw(rate), host_dram_bytes_per_s=data.draw(rate),
        host_bytes_per_h2d_byte=data.draw(rate), host_bytes_per_d2h_byte=data.draw(rate),
    )  # fmt: skip
    placements = data.draw(st.lists(st.sampled_from(Placement), min_size=1, max_size=12))
    subgroups = [Subgroup(i, n := data.draw(st.integers(1, 20)), 2 * n, 12 * n) for i in range(len(placements))]
    plan = lower(placements, num_slots=data.draw(st.integers(1, 3)), num_staging=data.draw(st.integers(1, 3)))
    bound = plan_bound(plan, subgroups, machine)
    assert predict(plan, subgroups, machine).update_s >= bound.seconds * (1 - 1e-9)
    update = Update(sum(s.numel for s, where in zip(subgroups, placements, strict=True)
                        if where is not Placement.RESIDENT))  # fmt: skip
    without_device = Rates(**{**{key: getattr(machine, key) for key in Rates.__slots__},
                              "device_update_params_per_s": math.inf})  # fmt: skip
    assert best_split(update, without_device)[1].seconds <= bound.seconds * (1 + 1e-9)


@pytest.mark.parametrize("name", HardwareProfile.names())
def test_long_streams_come_near_the_bound_on_every_shipped_profile(name: str) -> None:
    """All on the device, 200 equal subgroups, three slots: fill and drain are 2 of 200."""
    machine = Rates.from_profile(HardwareProfile.load(name))
    subgroups = [Subgroup(i, 10**8, 2 * 10**8, 12 * 10**8) for i in range(200)]
    plan = lower([Placement.DEVICE] * 200, num_slots=3, num_staging=0)
    bound = plan_bound(plan, subgroups, machine)
    assert bound.seconds == pytest.approx(all_device_bound(Update(200 * 10**8), machine).seconds)
    assert bound.seconds <= predict(plan, subgroups, machine).update_s <= 1.03 * bound.seconds
