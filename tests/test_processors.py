"""The host's processors, from files as the kernel writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

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
