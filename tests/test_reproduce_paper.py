"""The published tables beside the simulation: how near, from one profile for each machine; and how files are read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench.paper_artifact import simulate
from bench.paper_tables import PUBLISHED, SWEEP, Row, Run, read_tables
from bench.reproduce_paper import MISS, Comparison, as_json, compare, main, report, summarize
from offload.hardware import HardwareProfile

CONTENT = json.loads(PUBLISHED.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def comparisons() -> list[Comparison]:
    return compare(read_tables())


def write(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_simulation_is_near_the_published_times(comparisons: list[Comparison]) -> None:
    summary = summarize(comparisons)
    assert summary["update_rms"] <= 0.05
    assert summary["update_worst"] <= 0.10
    assert summary["iter_rms"] <= 0.08


def test_every_number_of_the_tables_is_a_row(comparisons: list[Comparison]) -> None:
    def num_times(section: object) -> int:
        if isinstance(section, dict):
            return sum(num_times(value) for key, value in section.items() if key not in ("_about", "model", "cpu_ratio",
                                                                                         "micro_batch"))  # fmt: skip
        return sum(map(num_times, section)) if isinstance(section, list) else 1

    sections = {key: value for key, value in CONTENT.items() if key.startswith(("phases", "static", "stride", "micro"))}
    num_sums = 2 * len(CONTENT["phases_h100"])
    assert len(comparisons) == num_times(sections) + num_sums


def test_misses_are_explained(comparisons: list[Comparison]) -> None:
    text = report(comparisons)
    misses = [c for c in comparisons if abs(c.error) > MISS]
    for comparison in misses:
        assert f"- {comparison.row.run}, {comparison.row.quantity}" in text
        assert not comparison.explanation().startswith("cause not known")
    assert {"explanation" in row for row in as_json(misses)["rows"]} == {True}


@pytest.mark.parametrize("model", CONTENT["subgroup_sizes_per_rank"])
def test_packing_gives_the_published_sizes(model: str) -> None:
    assert read_tables().models[model].subgroup_numels(4) == CONTENT["subgroup_sizes_per_rank"][model]


@pytest.mark.parametrize("model", CONTENT["models"])
def test_packing_keeps_every_parameter(model: str) -> None:
    tables = read_tables()
    numels = tables.models[model].subgroup_numels(4)
    assert 4 * sum(numels) == pytest.approx(tables.models[model].num_params, rel=1e-4)
    assert min(numels[:-1]) >= 100_000_000


def test_best_stride_is_the_published_one() -> None:
    tables = read_tables()
    for machine in ("h100", "a100"):
        profile = HardwareProfile.load(f"dos-{machine}")
        times = {k: simulate(Run(machine, "7B", "interleaved", update_stride=k), profile, tables).update
                 for k in (2, 3, 4, 6, 8, 10)}  # fmt: skip
        assert min(times, key=lambda k: times[k]) == 2
        assert times[2] < simulate(Run(machine, "7B", "zero3"), profile, tables).update


@pytest.mark.parametrize("schedule", ["zero3", "backward_only", "interleaved"])
def test_residents_and_asynchronous_copies_save_time(schedule: str) -> None:
    tables, profile = read_tables(), HardwareProfile.load("dos-h100")
    all_on_cpu, half = (simulate(Run("h100", "20B", schedule, cpu_ratio=r), profile, tables) for r in (1.0, 0.5))
    assert half.update < all_on_cpu.update
    assert half.backward < all_on_cpu.backward
    zero3 = simulate(Run("h100", "20B", "zero3"), profile, tables)
    assert all_on_cpu.backward <= zero3.backward
    assert all_on_cpu.forward == zero3.forward


# ---- other rows


def test_other_rows_need_only_themselves(tmp_path: Path) -> None:
    content = {
        "_about": "more rows",
        "phases_a100": [{"model": "13B", "zero3": {"update": 3.73}, "interleaved_k4": {"update": 3.0}}],
        "static_ratio_h100_13B": [{"cpu_ratio": 0.9, "backward_only": {"iter": 2.5}}],
        "micro_batch_h100_8.3B": [{"micro_batch": 2, "interleaved_iter": 3.0}],
    }
    path = write(tmp_path, content)
    assert list(read_tables(path).rows) == [
        Row(Run("a100", "13B", "zero3"), "update", 3.73),
        Row(Run("a100", "13B", "interleaved", update_stride=4), "update", 3.0),
        Row(Run("h100", "13B", "backward_only", cpu_ratio=0.9), "iter", 2.5),
        Row(Run("h100", "8.3B", "interleaved", micro_batch=2), "iter", 3.0),
    ]
    assert main(["--rows", str(path), "--json", str(tmp_path / "out.json")]) == 0
    written = json.loads((tmp_path / "out.json").read_text())
    assert {"update_rms", "update_worst", "iter_rms"} <= written.keys()
    assert written["update_rows"] == 2
    assert [row["profile"] for row in written["rows"]] == ["dos-a100", "dos-a100", "dos-h100", "dos-h100"]


def test_rows_may_say_what_differs_from_the_tables(tmp_path: Path) -> None:
    """Published by the same authors, but in no table of ours: one rank of the A100 node, by the node's one profile."""
    content = {
        "phases_a100": [
            {"model": "13B", "gpus": 1, "zero3": {"forward": 0.37, "backward": 8.68, "update": 8.0, "iter": 17.48}},
            {"model": "7B", "gpus": 1, "micro_batch": 4, "zero3": {"forward": 0.64, "backward": 5.95, "update": 3.95}},
            {"_about": "sizes", "model": "7B", "gpus": 1, "subgroup_size": 10**7, "backward_only": {"update": 4.11}},
            {"model": "7B", "gpus": 1, "subgroup_size": 10**9, "backward_only": {"update": 3.76}},
            {"model": "13B", "zero3": {"update": 3.73}},
        ]
    }
    comparisons = compare(read_tables(write(tmp_path, content)))
    assert len(comparisons) == 11
    assert max(abs(c.error) for c in comparisons) < MISS
    sizes = read_tables().numels_of("7B", num_ranks=1, subgroup_size=10**9)
    assert len(sizes) == 6
    assert sum(sizes) == pytest.approx(5.949e9, rel=1e-3)


def test_options_of_a_row_change_its_times() -> None:
    tables, profile = read_tables(), HardwareProfile.load("dos-h100")
    usual = simulate(Run("h100", "7B", "zero3"), profile, tables)
    longer = simulate(Run("h100", "7B", "zero3", sequence=4096), profile, tables)
    kept = simulate(Run("h100", "7B", "zero3", recompute=False), profile, tables)
    alone = simulate(Run("h100", "7B", "zero3", num_ranks=1), profile, tables)
    assert longer.forward - usual.forward == pytest.approx(2 * 5.949e9 * 2048 / profile.device_flops, rel=1e-3)
    assert usual.backward - kept.backward == pytest.approx(2 * 5.949e9 * 2048 / profile.device_flops, rel=1e-3)
    assert usual.update < alone.update < 4 * usual.update, "four times the parameters, with four times the cores"


def test_other_misses_name_their_phase(tmp_path: Path) -> None:
    row = {"model": "7B", "zero3": {"forward": 0.146, "backward": 3.4, "update": 0.886, "iter": 5.0}}
    comparisons = compare(read_tables(write(tmp_path, {"phases_h100": [row]})))
    text = report(comparisons)
    assert re.search(r"h100 7B zero3, iter \(-\d+\.\d%\): of -1\.\d+ s, -1\.\d+ s are backward", text), text
    assert "conversions at 1.05 billion parameters/s" in text


def test_rows_may_bring_their_model(tmp_path: Path) -> None:
    model = {"layers": 48, "hidden": 4096, "ffn": 11008, "params_real": 8.6e9}
    path = write(tmp_path, {"models": {"9B": model}, "phases_h100": [{"model": "9B", "zero3": {"update": 1.3}}]})
    (comparison,) = compare(read_tables(path))
    assert comparison.simulated_s == pytest.approx(1.3, rel=0.1)


def test_models_of_two_matrices_are_packed_too(tmp_path: Path) -> None:
    """GPT-3's 6.7B: 4 h^2 of attention and 8 h^2 of MLP a layer."""
    model = {"layers": 32, "hidden": 4096, "ffn": 16384, "params_real": 6.86e9}
    path = write(tmp_path, {"models": {"6.7B": model}, "phases_h100": [{"model": "6.7B", "zero3": {"update": 1.0}}]})
    numels = read_tables(path).numels_of("6.7B")
    assert min(numels) > 0
    assert 4 * sum(numels) == pytest.approx(6.86e9, rel=2e-2)
    model["params_real"] = 2e9
    path = write(tmp_path, {"models": {"6.7B": model}, "phases_h100": [{"model": "6.7B", "zero3": {"update": 1.0}}]})
    assert main(["--rows", str(path)]) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "must be an object of sections"),
        ({"phase_h100": []}, "unknown section 'phase_h100'; known are"),
        ({"phases_h100": [{"model": "99B", "zero3": {"update": 1.0}}]}, "unknown models 99B"),
        ({"phases_b200": [{"model": "7B", "zero3": {"update": 1.0}}]}, "no profile for the machines b200"),
        ({"phases_h100": [{"model": "7B", "interleaved_k1": {"update": 1.0}}]}, "update stride 1"),
        ({"static_ratio_h100_7B": [{"cpu_ratio": 1.2, "zero3": {"update": 1.0}}]}, "cpu_ratio 1.2 is no share"),
        ({"phases_h100": [{"model": "7B", "zero3": 1.0}]}, "a row is not of the form of"),
        ({"phases_h100": [{"model": "7B", "tp": 2, "zero3": {}}]}, "'tp' of a row of h100 is neither a schedule nor"),
        ({"phases_h100": [{"model": "7B", "gpus": 0, "zero3": {}}]}, "num_ranks 0 is not possible"),
        ({SWEEP: {"h100": {"big": {"2": 1.0}}}}, "'big' of stride_sweep.* names no number of parameters"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any, message: str) -> None:
    assert main(["--rows", str(write(tmp_path, content))]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--rows", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
