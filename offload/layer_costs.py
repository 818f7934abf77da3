"""What the layers of a model cost in a training step: seconds, and device memory that comes and goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offload.hardware import HardwareProfile

FORWARD_OPERATIONS = 2  # floating-point operations per parameter and token
BACKWARD_OPERATIONS = 4


@dataclass(frozen=True, slots=True)
class Layer:
    """What one layer of the model costs in one step of one rank.

    Attributes:
        forward_s, backward_s: seconds on the compute lane, recomputation included.
        grad_bytes: gradients that its backward leaves on the device until the step is over.
        saved_bytes: activations kept on the device from its forward until its backward is done.
        working_bytes: what its backward takes beyond that while it runs (recomputed activations, temporaries).
    """

    forward_s: float
    backward_s: float
    grad_bytes: int = 0
    saved_bytes: int = 0
    working_bytes: int = 0


def uniform_layers(
    profile: HardwareProfile,
    *,
    num_layers: int,
    numel: int,
    num_tokens: int,
    recompute: bool = True,
    grad_bytes: int = 0,
    saved_bytes: int = 0,
    working_bytes: int = 0,
) -> list[Layer]:
    """Equal layers of a transformer on one device of ``profile``.

    Args:
        numel: parameters of all layers together, of which each token costs 2 operations in forward, 4 in backward.
        num_tokens: of this rank in one step (micro-batch times sequence).
        recompute: forward is done again in backward (activation checkpointing).
        grad_bytes, saved_bytes, working_bytes: of one layer, see :class:`Layer`.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers={num_layers} is no number of layers; give 1 or more")
    forward_s = FORWARD_OPERATIONS * numel / num_layers * num_tokens / profile.device_flops
    backward_s = forward_s * BACKWARD_OPERATIONS / FORWARD_OPERATIONS + (forward_s if recompute else 0.0)
    layer = Layer(
        forward_s + profile.forward_layer_latency_s,
        backward_s + profile.backward_layer_latency_s,
        grad_bytes,
        saved_bytes,
        working_bytes,
    )
    return [layer] * num_layers


def room_in_backward(layers: Sequence[Layer], *, until_next_forward: bool = False) -> list[int]:
    """Bytes of device memory that backward gives back: after each of its layers (the model's last first), what nothing
    takes any more.

    The most that a step takes is there again once activations are freed, as far as neither gradients nor the rest of
    backward take it.

    Args:
        until_next_forward: nor the next forward, whose layers keep their gradients until they were updated.
    """
    grad_bytes, saved_bytes = sum(x.grad_bytes for x in layers), sum(x.saved_bytes for x in layers)
    held, during = saved_bytes, []  # beyond what is there all the time
    for layer in reversed(layers):
        during.append(held + layer.working_bytes + layer.grad_bytes)
        held += layer.grad_bytes - layer.saved_bytes
    most = max([saved_bytes, grad_bytes, *during])
    later = max(saved_bytes, grad_bytes) if until_next_forward else grad_bytes
    room = []
    for taken in reversed(during):
        room.append(most - later)
        later = max(later, taken)
    return room[::-1]
