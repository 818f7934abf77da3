"""Blocks of compact state are updated each for itself, by whole vectors as by single elements."""

from __future__ import annotations

import pytest
import torch

from offload.kernels import STATE_FORMATS, Rounding, SGDScalars, State, available_implementations, update
from offload.kernels.state import BLOCK_NUMEL, num_blocks


@pytest.mark.parametrize("num_blocks_and_rest", [(3, 0), (3, 5)])
@pytest.mark.parametrize("state_format", STATE_FORMATS[1:])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("implementation", available_implementations())
def test_a_tie_is_not_seen_by_the_next_block(
    implementation: str, momentum: float, state_format: str, num_blocks_and_rest: tuple[int, int]
) -> None:
    """Rules without a second moment have no place for the mark of a tie: it must not come to lie in a neighbour's."""
    blocks, rest = num_blocks_and_rest
    numel = blocks * BLOCK_NUMEL + rest
    param, remainder = torch.ones(numel, dtype=torch.bfloat16), torch.zeros(numel, dtype=torch.int16)
    grad = torch.zeros(numel)
    grad[0] = -(2.0**-8)  # from 1 to half way between 1 and the next bfloat16
    first = first_scale = None
    if momentum:
        dtype = {"split16": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}[state_format]
        first = torch.zeros(numel, dtype=dtype)
        first_scale = torch.zeros(num_blocks(numel)) if state_format == "int8" else None
    scalars = SGDScalars.at_step(lr=1.0, momentum=momentum, dampening=0.0, weight_decay=0.0, nesterov=False, step=1)
    state = State(state_format, remainder, first, first_scale=first_scale)
    update(state, grad, param, scalars=scalars, rounding=Rounding(), implementation=implementation)
    assert torch.equal(param, torch.ones_like(param))
    assert remainder[0] == 0x7FFF, "a tie, moved by one fp32 ulp"
    assert not remainder[1:].any()
