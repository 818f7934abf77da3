"""Hardware profiles: what ships is sound and sourced, what is wrong is named."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from offload.hardware import Figure, HardwareProfile

SHIPPED = [
    "a100-pcie4-node",
    "dos-a100",
    "dos-h100",
    "gh200",
    "h100-sxm-16-cores",
    "h100-sxm-node",
    "rtx3090-desktop",
    "rtx4090-desktop",
]


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    """A sound profile as JSON."""
    path = tmp_path / "sound.json"
    HardwareProfile.load("rtx4090-desktop").save(path)
    parsed: dict[str, Any] = json.loads(path.read_text())
    return parsed


def load(content: object, tmp_path: Path) -> HardwareProfile:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(content))
    return HardwareProfile.load(path)


def test_shipped_names() -> None:
    assert HardwareProfile.names() == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_profile_is_sound(name: str) -> None:
    profile = HardwareProfile.load(name)
    assert profile.name == name
    assert 0 < profile.duplex_factor <= 1
    # A fused pass moves 28 bytes a parameter: no faster than memory, on either side.
    assert profile.host_update_params_per_s * 28 <= profile.host_dram_bytes_per_s * 1.01
    assert profile.device_update_params_per_s * 28 <= profile.device_memory_bytes_per_s * 1.01
    for figure in profile.figures.values():
        assert figure.basis != "measured", "measure on the machine and name the run, or say whose figure it is"


@pytest.mark.parametrize("name", SHIPPED)
def test_saved_profile_loads_equal(name: str, tmp_path: Path) -> None:
    profile = HardwareProfile.load(name)
    profile.save(tmp_path / "again.json")
    again = HardwareProfile.load(tmp_path / "again.json")
    assert again == profile
    assert hash(again) == hash(profile)


@pytest.mark.parametrize("name", ["dos-h100", "dos-a100"])
def test_profiles_of_the_published_tables_repeat_their_best_stride(name: str) -> None:
    """With one set of device buffers, that is 1 + 24 U / B: 2 was measured on both."""
    profile = HardwareProfile.load(name)
    assert round(1 + 24 * profile.host_update_params_per_s / profile.h2d_bytes_per_s) == 2


@pytest.mark.parametrize("name", SHIPPED)
def test_fewer_bytes_of_state_are_updated_no_slower(name: str) -> None:
    profile = HardwareProfile.load(name)
    rates = [profile.host_update_rate(state_format) for state_format in ("fp32", "split16", "bf16", "int8")]
    assert rates[0] == profile.host_update_params_per_s
    assert rates == sorted(rates)


def test_ranks_at_work_share_the_node() -> None:
    profile = HardwareProfile.load("h100-sxm-node")
    assert [profile.share_of(num_ranks) for num_ranks in (8, 4, 1)] == [1, 2, 8]


def test_describe_gives_each_number_its_source() -> None:
    profile = HardwareProfile.load("gh200")
    text = profile.describe()
    for key, figure in profile.figures.items():
        assert key in text
        assert figure.source in text


def test_with_figures_replaces_a_number_and_its_source() -> None:
    profile = HardwareProfile.load("rtx4090-desktop")
    measured = profile.with_figures(h2d_bytes_per_s=Figure(2.6e10, "measured", "first ten steps"))
    assert measured.h2d_bytes_per_s == 2.6e10
    assert measured.figures["h2d_bytes_per_s"].source == "first ten steps"
    assert measured.d2h_bytes_per_s == profile.d2h_bytes_per_s
    assert profile.h2d_bytes_per_s == 2.5e10


def test_number_cannot_change_without_its_source() -> None:
    profile = HardwareProfile.load("rtx4090-desktop")
    with pytest.raises(ValueError, match=r"h2d_bytes_per_s is 26000000000.0 without a source.*with_figures"):
        dataclasses.replace(profile, h2d_bytes_per_s=2.6e10)


def test_duplex_factor() -> None:
    profile = HardwareProfile.load("rtx4090-desktop").with_figures(
        both_bytes_per_s=Figure(2.0e10, "assumed", "test"), d2h_bytes_per_s=Figure(4.0e10, "assumed", "test")
    )
    assert profile.duplex_factor == 0.8


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda profile: pickle.loads(pickle.dumps(profile))])
def test_profile_can_be_copied(copied: Any) -> None:
    profile = HardwareProfile.load("dos-a100")
    assert copied(profile) == profile


# -- mistakes


@pytest.mark.parametrize("num_ranks", [0, -1, 9])
def test_more_ranks_than_a_node_holds(num_ranks: int) -> None:
    with pytest.raises(ValueError, match=rf"num_ranks={num_ranks} is not between 1 and the 8 that share a node"):
        HardwareProfile.load("h100-sxm-node").share_of(num_ranks)


def test_unknown_state_format() -> None:
    with pytest.raises(ValueError, match="state_format='fp8' is unknown; known are fp32, split16, bf16, int8"):
        HardwareProfile.load("gh200").host_update_rate("fp8")


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"no hardware profile 'h100'.*h100-sxm-node"):
        HardwareProfile.load("h100")


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("h2d_bytes_per_s", 0, "a positive finite number"),
        ("d2h_bytes_per_s", -1.0, "a positive finite number"),
        ("device_flops", float("inf"), "a positive finite number"),
        ("host_dram_bytes_per_s", float("nan"), "a positive finite number"),
        ("host_update_params_per_s", "fast", "a number"),
        ("device_update_params_per_s", True, "a number"),
        ("device_memory_bytes_per_s", None, "a number"),
        ("copy_latency_s", -1e-6, "0 or a positive finite number of seconds"),
        ("backward_layer_latency_s", float("inf"), "0 or a positive finite number of seconds"),
        ("host_bytes_per_h2d_byte", 0, "a positive finite number"),
        ("num_ranks_per_node", 1.5, "a whole number from 1 upward"),
        ("num_ranks_per_node", 0, "a whole number from 1 upward"),
        ("device_memory_bytes", 8e10, "a whole number from 1 upward"),
    ],
)
def test_value_out_of_range(content: dict[str, Any], tmp_path: Path, key: str, value: object, wanted: str) -> None:
    content["figures"][key]["value"] = value
    with pytest.raises(ValueError) as raised:
        load(content, tmp_path)
    message = str(raised.value)
    assert f"{key} is {value!r}; give {wanted}" in message
    assert "profile.json" in message


def test_latency_may_be_zero(content: dict[str, Any], tmp_path: Path) -> None:
    content["figures"]["copy_latency_s"]["value"] = 0
    assert load(content, tmp_path).copy_latency_s == 0


def test_two_directions_cannot_be_faster_than_one(content: dict[str, Any], tmp_path: Path) -> None:
    content["figures"]["both_bytes_per_s"]["value"] = 3e10
    with pytest.raises(ValueError, match=r"both_bytes_per_s is 3e\+10, more than the slower direction has alone"):
        load(content, tmp_path)


@pytest.mark.parametrize("basis", ["guessed", "", None])
def test_unknown_basis(content: dict[str, Any], tmp_path: Path, basis: object) -> None:
    content["figures"]["device_flops"]["basis"] = basis
    with pytest.raises(
        ValueError, match="figure device_flops: basis must be one of measured, published, derived, assumed"
    ):
        load(content, tmp_path)


@pytest.mark.parametrize("source", ["", "  ", 7])
def test_number_without_a_source(content: dict[str, Any], tmp_path: Path, source: object) -> None:
    content["figures"]["device_flops"]["source"] = source
    with pytest.raises(ValueError, match=r"figure device_flops: source .*say where the number comes from"):
        load(content, tmp_path)


def test_missing_and_unknown_fields(content: dict[str, Any], tmp_path: Path) -> None:
    figure = content["figures"].pop("device_flops")
    with pytest.raises(ValueError, match="lacks device_flops"):
        load(content, tmp_path)
    content["figures"] |= {"device_flops": figure, "device_flop": figure}
    with pytest.raises(ValueError, match=r"unknown fields device_flop;.*device_flops"):
        load(content, tmp_path)


@pytest.mark.parametrize("broken", [[], "text", {"name": "x"}, {"name": "x", "description": "", "figures": 3}])
def test_file_that_is_no_profile(tmp_path: Path, broken: object) -> None:
    with pytest.raises(ValueError, match=r"profile\.json: .*(must be an object|lacks)"):
        load(broken, tmp_path)


def test_file_that_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json"):
        HardwareProfile.load(path)
