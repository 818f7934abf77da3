"""A whole step: phases by hand, what hides behind what, and memory over time."""

from __future__ import annotations

import pytest

from offload.hardware import HardwareProfile
from offload.perf_model import Rates, predict
from offload.phases import Layer, predict_step, uniform_layers
from offload.plan import Placement, Plan, lower
from offload.subgroup import Subgroup
from offload.timeline import exposed_s

HOST, DEVICE, RESIDENT = Placement.HOST, Placement.DEVICE, Placement.RESIDENT
# A subgroup of one parameter: gradient down 1 s, parameters up 1 s, state 6 s each way, CPU 5 s, device 2 s.
BY_HAND = Rates(2.0, 2.0, 1 / 5, 1 / 2)
LAYERS = [Layer(3.0, 6.0), Layer(4.0, 8.0)]


def subgroups(num: int) -> list[Subgroup]:
    return [Subgroup(i, 1, 2, 12) for i in range(num)]


def test_host_update_is_exposed_whole() -> None:
    step = predict_step(Plan.parse("D0@0 C0@0 U0@0"), subgroups(1), BY_HAND, LAYERS)
    assert (step.forward_s, step.backward_s, step.update_s) == (7, 14, 1 + 5 + 1)
    assert step.step_s == 28


def test_flush_hides_behind_the_next_forward() -> None:
    """Prefetch and update are exposed, the flush of the step before runs beside the forward."""
    step = predict_step(Plan.parse("P0@0 G0@0 F0@0"), subgroups(1), BY_HAND, LAYERS)
    assert (step.forward_s, step.backward_s, step.update_s) == (7, 14, 6 + 2)
    assert [(s.name, s.start_s, s.end_s) for s in step.spans if s.name == "F0@0"] == [("F0@0", 0, 6), ("F0@0", 29, 35)]


def test_flush_longer_than_the_model_delays_the_next_prefetch() -> None:
    step = predict_step(Plan.parse("P0@0 G0@0 F0@0"), subgroups(1), BY_HAND, [Layer(0.5, 1.0)])
    assert step.update_s == 6 - 1.5 + 6 + 2


def test_without_layers_a_step_is_its_update() -> None:
    plan = lower([HOST, DEVICE, RESIDENT, HOST], num_slots=1, num_staging=2)
    step = predict_step(plan, subgroups(4), BY_HAND, [])
    assert step.forward_s == step.backward_s == 0
    assert step.update_s >= predict(plan, subgroups(4), BY_HAND).params_ready_s


def test_spans_are_those_of_one_step() -> None:
    plan = lower([HOST, DEVICE, HOST], num_slots=1, num_staging=2)
    step = predict_step(plan, subgroups(3), BY_HAND, LAYERS)
    inside = [span for span in step.spans if span.start_s >= 0]
    assert [span.name for span in inside if span.lane == "compute"] == ["forward"] * 2 + ["backward"] * 2 + ["G1@0"]
    assert {span.name for span in inside} == {"forward", "backward", *map(str, plan.ops)}
    assert exposed_s([span for span in inside if span.end_s <= step.step_s]) == pytest.approx(step.update_s)


def test_memory_follows_the_phases() -> None:
    """Parameters 8 and a slot 12 rest; activations come and go, gradients come in backward, last layer first."""
    layers = [Layer(3.0, 6.0, 4, 10, 100), Layer(4.0, 8.0, 4, 20, 50)]
    plan = lower([HOST, DEVICE, RESIDENT, HOST], num_slots=1, num_staging=1)
    step = predict_step(plan, subgroups(4), BY_HAND, layers)
    rest = 8 + 12 + 12
    assert [(point.time_s, point.phase, point.num_bytes - rest) for point in step.memory] == [
        (0, "forward", 0),
        (3, "forward", 10),
        (7, "forward", 30),
        (7, "backward", 30 + 50 + 4),
        (15, "backward", 10 + 4),
        (15, "backward", 10 + 4 + 100 + 4),
        (21, "backward", 8),
        (21, "update", 8),
    ]
    assert step.peak_bytes == {"forward": rest + 30, "backward": rest + 118, "update": rest + 8}


def test_layers_of_a_profile() -> None:
    profile = HardwareProfile.load("dos-h100")
    layers = uniform_layers(profile, num_layers=40, numel=15_327_000_000, num_tokens=2048, saved_bytes=7)
    assert len(layers) == 40
    arithmetic_s = 15.327e9 * 2048 / profile.device_flops
    assert sum(x.forward_s for x in layers) == pytest.approx(2 * arithmetic_s + 40 * profile.forward_layer_latency_s)
    assert sum(x.backward_s for x in layers) == pytest.approx(6 * arithmetic_s + 40 * profile.backward_layer_latency_s)
    without = uniform_layers(profile, num_layers=40, numel=15_327_000_000, num_tokens=2048, recompute=False)
    assert sum(x.backward_s for x in without) == pytest.approx(4 * arithmetic_s + 40 * profile.backward_layer_latency_s)
    assert layers[3].saved_bytes == 7


def test_no_layers_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="num_layers=0 is no number of layers; give 1 or more"):
        uniform_layers(HardwareProfile.load("gh200"), num_layers=0, numel=1, num_tokens=1)


def test_profile_stands_for_its_rates() -> None:
    profile = HardwareProfile.load("gh200")
    plan = lower([HOST, DEVICE], num_slots=1, num_staging=1)
    assert predict_step(plan, subgroups(2), profile, LAYERS) == predict_step(
        plan, subgroups(2), Rates.from_profile(profile), LAYERS
    )
