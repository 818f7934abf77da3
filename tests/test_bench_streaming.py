"""The figures of bench/streaming.py exist and hold, on fewer blocks than it measures."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

from bench import streaming as bench


@pytest.fixture(autouse=True)
def quick(sim: ModuleType, one_torch_thread: None) -> Iterator[None]:
    sim.configure("sync", races=False, poison=False)
    yield
    sim.reset()


@pytest.mark.parametrize(("unequal", "least"), [(False, 0.95), (True, 0.9)])
def test_ours_is_close_to_the_limit(unequal: bool, least: float) -> None:
    sizes = bench.inners(10, unequal=unequal)
    bench.set_machine(bench.RATIOS["balanced"])
    bound_s = max(bench.unstreamed(sizes), bench.weight_bytes(bench.Chain(sizes)) / bench.LINK_BYTES_PER_S)
    run = bench.ours(sizes)
    assert least < bound_s / run["pass_s"] <= 1.001
    assert run["peak_bytes"] < 1.02 * run["weight_bytes_billed"] + 100_000, "activations are small here"


def test_accelerate_does_not_overlap() -> None:
    pytest.importorskip("accelerate")
    sizes = bench.inners(6, unequal=False)
    bench.set_machine(bench.RATIOS["balanced"])
    assert bench.with_accelerate(sizes) > 1.9 * bench.ours(sizes)["pass_s"]


def test_experts_that_are_not_routed_to_cost_nothing() -> None:
    """Two of sixteen are used in a pass, and half of all fit: eight times fewer bytes, and most of those are there."""
    found = bench.mixture(3)
    assert found["loads per visit"] < 0.4
    assert found["with their block"] > 8 * found["cached"]
