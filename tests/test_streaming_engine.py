"""The streaming engine without tensors: places, call order, waits, and the physical limit."""

from __future__ import annotations

from typing import Any

import pytest

from offload.lanes import Lanes, Work
from offload.lanes.ordering import AccessHistory, ordering_lanes
from offload.streaming import prediction
from offload.streaming.arena import ALIGN_BYTES, Arena
from offload.streaming.engine import Engine
from offload.streaming.order import CallOrder
from offload.streaming.placement import arena_bytes_for, spread_evenly
from offload.streaming.prediction import Machine, PassPrediction, arena_cells, predict_pass, sizes_engine

UNIT = ALIGN_BYTES


# ---- the arena


def test_places_walk_round_and_are_found_again() -> None:
    arena = Arena(4 * UNIT)
    assert [arena.place(i, UNIT) for i in range(4)] == [0, UNIT, 2 * UNIT, 3 * UNIT]
    assert arena.place(4, 1) is None
    arena.free(1)
    arena.free(2)
    assert arena.place(5, 2 * UNIT) == UNIT


def test_next_fit_goes_on_behind_the_last_place() -> None:
    arena = Arena(4 * UNIT)
    arena.place(0, UNIT)
    arena.place(1, UNIT)
    arena.free(0)
    assert arena.place(2, UNIT) == 2 * UNIT, "the first gap is free too, but the ring goes on"


def test_sizes_are_rounded_up_to_the_alignment() -> None:
    arena = Arena(2 * UNIT)
    arena.place(0, 1)
    assert arena.place(1, 1) == UNIT


# ---- the order


def upcoming(order: CallOrder) -> list[int]:
    return [*order.distinct(order.upcoming())]


def test_the_first_pass_is_expected_in_the_order_of_the_model() -> None:
    order = CallOrder(4)
    order.begin_pass(training=False)
    order.note(0)
    assert [*order.upcoming()] == [1, 2, 3, 0]


def test_backward_visits_layers_again_the_last_first() -> None:
    order = CallOrder(3)
    order.begin_pass(training=True, wraps=False)
    for layer in (0, 1, 2):
        order.note(layer)
    assert [*order.upcoming()] == [2, 1, 0], "and not the next pass, whose weights an optimizer may change"


def test_a_pass_teaches_the_next_one() -> None:
    order = CallOrder(4)
    order.begin_pass(training=False)
    for layer in (0, 2, 2, 1):
        order.note(layer)
    order.begin_pass(training=False)
    assert [*order.upcoming()] == [0, 2, 2, 1]
    order.note(1)
    assert upcoming(order) == [0, 2, 1], "a layer that comes early moves on to where it is next expected"


def test_a_failed_pass_teaches_nothing() -> None:
    order = CallOrder(3)
    order.begin_pass(training=False)
    order.note(2)
    order.abandon_pass()
    order.begin_pass(training=False)
    assert upcoming(order) == [0, 1, 2]


def test_kinds_of_passes_are_learned_apart() -> None:
    order = CallOrder(2)
    order.begin_pass(training=False)
    order.note(1)
    order.begin_pass(training=True)
    assert [*order.upcoming()] == [0, 1, 1, 0]
    order.note(0)
    order.begin_pass(training=False)
    assert [*order.upcoming()] == [1]


# ---- waits


def run_passes(engine: Engine, lanes: Lanes, num_layers: int) -> None:
    for _ in range(3):
        engine.begin_pass(training=False)
        for layer in range(num_layers):
            offset = engine.enter(layer)
            cells = arena_cells(offset, UNIT, UNIT)
            lanes.compute.submit(Work(f"forward {layer}", reads=cells))
            engine.leave(layer)


def hazards(num_layers: int, window: int, evict_batch: int = 1) -> list[str]:
    history = AccessHistory()
    lanes = ordering_lanes(history)
    engine = sizes_engine(
        [UNIT] * num_layers, window * UNIT, lanes, window=window, evict_batch=evict_batch, cell_bytes=UNIT
    )
    run_passes(engine, lanes, num_layers)
    return history.hazards


@pytest.mark.parametrize(("num_layers", "window"), [(1, 1), (5, 1), (5, 2), (6, 2), (7, 3), (8, 5), (3, 8)])
@pytest.mark.parametrize("evict_batch", [1, 2])
def test_every_access_is_ordered(num_layers: int, window: int, evict_batch: int) -> None:
    """Also where the number of layers is no multiple of the window, and passes wrap around."""
    assert hazards(num_layers, window, min(evict_batch, window)) == []


def test_without_the_wait_for_arrival_compute_reads_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    real = prediction.Engine

    def engine_of_deaf_compute(*args: Any, **kwargs: Any) -> Engine:
        monkeypatch.setattr(args[4].compute, "wait", lambda event: None)
        return real(*args, **kwargs)

    monkeypatch.setattr(prediction, "Engine", engine_of_deaf_compute)
    assert any("forward" in hazard and "reads" in hazard for hazard in hazards(5, 2))


def test_without_the_wait_for_compute_copies_overwrite_layers_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    real = prediction.SizesOnly.fetch
    monkeypatch.setattr(
        prediction.SizesOnly, "fetch", lambda self, layer, offset, after: real(self, layer, offset, None)
    )
    assert any("writes" in hazard and "read" in hazard for hazard in hazards(5, 2))


# ---- the limit


def predicted(
    num: int, num_streamed: int, compute_s: float, *, window: int, unequal: float = 0.0, tail: bool = False
) -> PassPrediction:
    """Blocks that take a second each over the link, more or less."""
    sizes = [
        round(UNIT * 100 * (1 + unequal * (-1) ** i * (0.4 + 0.6 * (i % 5) / 4))) // UNIT * UNIT for i in range(num)
    ]
    streamed = tuple(range(num - num_streamed, num)) if tail else spread_evenly(num, num_streamed)
    machine = Machine(UNIT * 100, tuple(compute_s * size / (UNIT * 100) for size in sizes))
    return predict_pass(machine, sizes, streamed, arena_bytes_for(sizes, streamed, window), window=window)


@pytest.mark.parametrize("num", [3, 8, 39, 40])
@pytest.mark.parametrize("compute_s", [0.25, 1.0, 4.0])
def test_two_places_reach_the_limit_for_equal_layers(num: int, compute_s: float) -> None:
    assert predicted(num, num, compute_s, window=2).bound_fraction == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("num_streamed", [1, 7, 10, 20])
def test_streamed_layers_spread_among_residents_reach_the_limit(num_streamed: int) -> None:
    compute_s = num_streamed / 40
    assert predicted(40, num_streamed, compute_s, window=2).bound_fraction > 0.95


def test_a_tail_of_streamed_layers_does_not() -> None:
    assert predicted(40, 20, 0.5, window=2, tail=True).bound_fraction < 0.75


def test_a_third_place_evens_out_what_does_not_divide() -> None:
    assert predicted(40, 30, 0.75, window=2).bound_fraction < 0.95 < predicted(40, 30, 0.75, window=3).bound_fraction


@pytest.mark.parametrize("compute_s", [0.25, 1.0, 4.0])
def test_four_places_reach_nine_tenths_for_unequal_layers(compute_s: float) -> None:
    assert predicted(40, 40, compute_s, window=4, unequal=0.6).bound_fraction > 0.9


def test_one_place_overlaps_nothing() -> None:
    assert predicted(40, 40, 1.0, window=1).bound_fraction == pytest.approx(0.5, abs=0.01)


def test_evicting_in_batches_costs_overlap() -> None:
    sizes = [UNIT * 100] * 12
    machine = Machine(UNIT * 100, (1.0,) * 12)
    times = [
        predict_pass(machine, sizes, range(12), 4 * UNIT * 100, window=4, evict_batch=batch).pass_s
        for batch in (1, 2, 4)
    ]
    assert times[0] <= times[1] < times[2]


def test_layers_in_use_together_must_fit() -> None:
    lanes = ordering_lanes(AccessHistory())
    engine = sizes_engine([UNIT, UNIT], UNIT, lanes, window=2, evict_batch=1)
    engine.enter(0)
    with pytest.raises(RuntimeError, match="in use at the same time"):
        engine.enter(1)
    engine.leave(0)
    assert engine.enter(1) == 0
