"""Layers that pass through a ring of slots on the device."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from offload.testing import watch_saved_tensors
from tests.known_bugs.catalogue import known_bug

NUMEL = 1024


def pinned_layers(num_layers: int) -> list[Tensor]:
    return [torch.full((NUMEL,), float(i + 1), pin_memory=True) for i in range(num_layers)]


class Ring:
    """Slots that one stream fills and the current stream computes with; the programs decide what waits for what."""

    def __init__(self, num_slots: int) -> None:
        self.slots = [torch.zeros(NUMEL, device="sim") for _ in range(num_slots)]
        self.compute, self.h2d = torch.accelerator.current_stream(), torch.Stream("sim")
        self.filled = [self.compute.record_event()] * num_slots
        self.used = list(self.filled)
        self.x = torch.ones(NUMEL, device="sim")
        self.h2d.wait_stream(self.compute)

    def fill(self, slot: int, layer: Tensor, waits: bool = True) -> None:
        if waits:
            self.h2d.wait_event(self.used[slot])
        with self.h2d:
            self.slots[slot].copy_(layer, non_blocking=True)
        self.filled[slot] = self.h2d.record_event()

    def use(self, slot: int, waits: bool = True) -> None:
        if waits:
            self.compute.wait_event(self.filled[slot])
        self.x.mul_(self.slots[slot])
        self.used[slot] = self.compute.record_event()


@known_bug("vLLM #54975, vllm-ascend #10932", says="aten::mul.out reads on stream 0")
def ring_slot_refilled_while_live(sim: ModuleType, has_bug: bool) -> None:
    """Layer i is computed in slot i % step, but layer (i + step) % M goes to a slot that another may be using."""
    layers, step = pinned_layers(5), 2
    ring = Ring(step)
    arrived = {}
    for i in range(step):
        ring.fill(i % step, layers[i])
        arrived[i] = ring.filled[i % step]
    for i in range(len(layers)):
        ring.compute.wait_event(arrived[i])
        ring.use(i % step, waits=False)
        following = (i + step) % len(layers)
        if has_bug or following > i:
            ring.h2d.wait_event(ring.used[i % step])
            ring.fill(following % step, layers[following], waits=False)
            arrived[following] = ring.filled[following % step]


@known_bug("wrap-around prefetch, as in diffusers #11966 and its fixes", says="h2d writes")
def wrap_around_prefetch_overtakes_the_last_layer(sim: ModuleType, has_bug: bool) -> None:
    """The first layer of the next pass goes up while the last layer of this one computes in that slot."""
    layers = pinned_layers(3)
    ring = Ring(1)
    for _ in range(2):
        for i, layer in enumerate(layers):
            ring.fill(0, layer, waits=not (has_bug and i == 0))
            ring.use(0)


@known_bug("axolotl #3512", says="aten::mul.out reads on stream 0")
def layer_marked_resident_before_its_copy_ended(sim: ModuleType, has_bug: bool) -> None:
    """The second step finds the layer marked resident, and so waits for nothing."""
    (layer,) = pinned_layers(1)
    ring = Ring(1)
    is_resident = False
    for _ in range(2):
        if not is_resident:
            ring.fill(0, layer)
            is_resident = True
            if has_bug:
                continue  # the pass that prefetched it ends early
        ring.use(0, waits=not has_bug)


@known_bug("diffusers #11041, #11097: NaN with streams", says="aten::mul.out reads on stream 0")
def layer_used_before_it_arrived(sim: ModuleType, has_bug: bool) -> None:
    ring = Ring(2)
    for i, layer in enumerate(pinned_layers(4)):
        ring.fill(i % 2, layer)
        ring.use(i % 2, waits=not has_bug)


@known_bug("diffusers #11375, #13211: order traced in the first pass", says="what nothing has written")
def slot_used_that_was_never_filled(sim: ModuleType, has_bug: bool) -> None:
    """The first pass leaves out a layer that the second runs."""
    (layer,) = pinned_layers(1)
    slot = torch.empty(NUMEL, device="sim")
    if not has_bug:
        slot.copy_(layer, non_blocking=True)
    torch.ones(NUMEL, device="sim") * slot


@known_bug("cache-dit #1111: torn reads of tied weights", says="h2d writes")
def tied_weight_filled_twice(sim: ModuleType, has_bug: bool) -> None:
    """Two modules share a weight, and each keeps its own event of when it was last used."""
    (weight,) = pinned_layers(1)
    ring = Ring(1)
    ring.fill(0, weight)
    ring.use(0)  # as the embedding
    ring.fill(0, weight, waits=not has_bug)  # for the head, which nothing has used yet
    ring.use(0)


@known_bug("rings of reused events", says="aten::mul.out reads on stream 0")
def event_waited_for_before_it_was_recorded(sim: ModuleType, has_bug: bool) -> None:
    """Waiting for an event that nobody has recorded yet is no error, and no wait."""
    (layer,) = pinned_layers(1)
    ring = Ring(1)
    filled = torch.Event("sim")
    if has_bug:
        ring.compute.wait_event(filled)
    with ring.h2d:
        ring.slots[0].copy_(layer, non_blocking=True)
    filled.record(ring.h2d)
    if not has_bug:
        ring.compute.wait_event(filled)
    ring.x.mul_(ring.slots[0])


@known_bug("events recorded a line too early", says="aten::mul.out reads on stream 0")
def event_recorded_before_the_copy(sim: ModuleType, has_bug: bool) -> None:
    (layer,) = pinned_layers(1)
    ring = Ring(1)
    with ring.h2d:
        if has_bug:
            filled = ring.h2d.record_event()
        ring.slots[0].copy_(layer, non_blocking=True)
        if not has_bug:
            filled = ring.h2d.record_event()
    ring.compute.wait_event(filled)
    ring.x.mul_(ring.slots[0])


@known_bug("two-slot rings refilled through .data", says="backward reads a tensor")
def slot_refilled_through_data_that_backward_reads(sim: ModuleType, has_bug: bool) -> None:
    """No error from autograd, and gradients of the wrong layer."""
    first, second = pinned_layers(2)
    slot = torch.empty(NUMEL, device="sim")
    other = torch.empty(NUMEL, device="sim")
    x = torch.ones(NUMEL, device="sim", requires_grad=True)
    with watch_saved_tensors():
        slot.copy_(first)
        y = x * slot
        into = slot if has_bug else other
        into.data.copy_(second)
        y = y * into
        y.sum().backward()
