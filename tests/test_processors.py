"""The host's processors, from files as the kernel writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

import offload
from offload.arguments import parse_options
from offload.kernels import num_threads, threads
from offload.processors import allowed_processors, numa_nodes, on_processors, parse_processors


def test_processors_of_a_list() -> None:
    assert parse_processors("0-3,8\n") == {0, 1, 2, 3, 8}
    assert parse_processors("\n") == frozenset()


def test_numa_nodes_are_those_with_processors_we_may_use(tmp_path: Path) -> None:
    usable = sorted(allowed_processors())
    for node, cpus in enumerate((f"{usable[0]}", "4095", "")):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}/cpulist").write_text(cpus)
    assert numa_nodes(tmp_path) == {0: {usable[0]}}
    assert numa_nodes(tmp_path / "missing") == {0: set(usable)}


def test_binding_to_processors_is_undone() -> None:
    before = allowed_processors()
    one = frozenset([min(before)])
    with pytest.raises(KeyError), on_processors(one):
        raise KeyError(*allowed_processors())
    assert allowed_processors() == before


@pytest.mark.parametrize(("num_ranks", "expected"), [("1", 6), ("2", 3), ("4", 1), ("8", 1)])
def test_ranks_of_a_node_share_its_processors(monkeypatch: pytest.MonkeyPatch, num_ranks: str, expected: int) -> None:
    monkeypatch.delenv("OFFLOAD_NUM_THREADS", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", num_ranks)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(6)))
    monkeypatch.setattr(threads, "_cgroup_processors", lambda path: None)
    threads._usable_processors.cache_clear()
    assert num_threads() == expected
    threads._usable_processors.cache_clear()


def test_ranks_of_a_node_share_its_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = offload.HardwareProfile.load("h100-sxm-node")
    rates = {}
    for num_ranks in (2, 8):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(num_ranks))
        options = parse_options(
            plan="auto", device_budget=None, host_budget=None, pinned_budget=None, subgroup_numel=None, num_slots=None,
            profile=profile,
        )  # fmt: skip
        assert options.rates is not None
        rates[num_ranks] = options.rates
    assert rates[8] == offload.Rates.from_profile(profile), "a profile is of all its ranks at work"
    assert rates[2].host_dram_bytes_per_s == 4 * rates[8].host_dram_bytes_per_s
    assert rates[2].host_update_params_per_s == 4 * rates[8].host_update_params_per_s
    assert rates[2].h2d_bytes_per_s == rates[8].h2d_bytes_per_s  # a link each
