"""A whole step: phases by hand, what hides behind what, and memory over time."""

from __future__ import annotations

import pytest

from offload.hardware import HardwareProfile
from offload.layer_costs import Layer, room_in_backward, uniform_layers
from offload.perf_model import Rates, predict
from offload.phases import Hiding, predict_step
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


# ---- hidden updates. Of one subgroup: gradient down 1 s, CPU 5 s, parameters up 1 s; state 6 s each way, device 2 s.


def hidden(plan: str, hiding: Hiding, layers: list[Layer] = LAYERS, num: int = 2) -> tuple[float, float]:
    """Seconds of a step, and of what the update adds to it."""
    step = predict_step(Plan.parse(plan), subgroups(num), BY_HAND, layers, hiding)
    return step.step_s, step.update_s


def test_update_in_backward_by_hand() -> None:
    """The last layer's subgroup: gradient at 15, new at 22; the first's: gradient at 21, down at 22, new at 28."""
    plan = "D1@0 C1@0 U1@0 D0@1 C0@1 U0@1"
    assert hidden(plan, Hiding("backward", in_backward=True)) == (28, 7)


def test_early_gradients_by_hand() -> None:
    """The last layer's gradient is down at 16, the first's at 22, and the update begins no earlier.

    In the order of forward its first layer waits for 1 + 5 + 1, and its last one for 5 + 1 - 3 - 1 more.
    """
    plan, early = "D0@0 C0@0 U0@0 D1@1 C1@1 U1@1", Hiding("next_forward", early_gradients=True)
    assert hidden("D1@0 C1@0 U1@0 D0@1 C0@1 U0@1", Hiding("backward")) == (7 + 14 + 1 + 5 + 5 + 1, 12)
    assert hidden(plan, early) == (21 + 7 + 2, 9)
    assert hidden(plan, Hiding("next_forward")) == (21 + 7 + 3, 10), "the last one's gradient waits for the first"
    assert hidden("D0@0 C0@0 U0@0 D1@0 C1@0 U1@0", early) == (21 + 7 + 4, 11), "and here for the staging buffer"


def test_rest_of_the_update_in_backward_runs_under_the_next_forward() -> None:
    """With the first layer's subgroup done last, its forward waits; with the last layer's, nothing waits but that."""
    forward_first = "D1@0 C1@0 U1@0 D0@1 C0@1 U0@1"
    assert hidden(forward_first, Hiding("next_forward", in_backward=True)) == (28, 7)
    assert hidden("D1@0 C1@0 U1@0", Hiding("next_forward", in_backward=True), num=2)[1] == 0


def test_passing_slots_wait_for_their_memory() -> None:
    """State comes up in the lasting slot at once, in the passing one once the last layer gave its activations back."""
    layers = [Layer(3.0, 6.0, saved_bytes=12), Layer(4.0, 8.0, saved_bytes=12)]
    plan = "P0@0 P1@1 G0@0 F0@0 G1@1 F1@1"
    in_turns = predict_step(Plan.parse(plan), subgroups(2), BY_HAND, layers, Hiding("backward"))
    passing = predict_step(Plan.parse(plan), subgroups(2), BY_HAND, layers, Hiding("backward", num_passing_slots=1))
    start_of = {span.name: span.start_s for span in passing.spans if span.lane == "h2d" and span.start_s >= 0}
    assert start_of["P1@1"] == 15
    assert passing.update_s == in_turns.update_s == 4
    most = max(point.num_bytes for point in passing.memory)
    assert most == max(point.num_bytes for point in in_turns.memory) - 12
    assert passing.peak_bytes["update"] == in_turns.peak_bytes["update"]


def test_gradients_stay_until_their_layer_was_updated() -> None:
    layers = [Layer(3.0, 6.0, grad_bytes=4, saved_bytes=10), Layer(4.0, 8.0, grad_bytes=4, saved_bytes=20)]
    step = predict_step(Plan.parse("D0@0 C0@0 U0@0"), subgroups(1), BY_HAND, layers, Hiding("next_forward"))
    assert [point.num_bytes for point in step.memory if point.phase == "forward"] == [2 + 8, 2 + 14, 2 + 30]


def test_room_in_backward() -> None:
    """Most is 34, in the last layer's backward: 20 + 10 saved, 4 of gradients. What follows it takes less."""
    layers = [Layer(1, 1, grad_bytes=4, saved_bytes=10), Layer(1, 1, grad_bytes=4, saved_bytes=20)]
    assert room_in_backward(layers) == [34 - 18, 34 - 8]
    assert room_in_backward(layers, until_next_forward=True) == [4, 4]
    assert room_in_backward([]) == []


def test_what_cannot_be_hidden_is_told() -> None:
    plan = Plan.parse("P0@0 G0@0 F0@0")
    with pytest.raises(ValueError, match="num_passing_slots=1: an update that begins in backward"):
        Hiding("backward", in_backward=True, num_passing_slots=1)
    with pytest.raises(ValueError, match=r"num_passing_slots=1 are too many: backward gives back 0 bytes, for 0 slots"):
        predict_step(plan, subgroups(1), BY_HAND, LAYERS, Hiding("backward", num_passing_slots=1))
    with pytest.raises(ValueError, match="overlap='auto' is no schedule"):
        Hiding("auto")
    for asked in ({"in_backward": True}, {"early_gradients": True}):
        with pytest.raises(ValueError, match="with overlap='none' nothing of the update runs in backward"):
            Hiding("none", **asked)
    with pytest.raises(ValueError, match="leave early_gradients out"):
        Hiding("next_forward", in_backward=True, early_gradients=True)
