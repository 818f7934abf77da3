"""Slabs: every field where it belongs, none over another, and bytes as counted."""

from __future__ import annotations

import pytest
import torch

from offload.kernels import STATE_FORMATS
from offload.kernels.state import num_blocks
from offload.state_layout import StateKind, StateLayout

MOMENTS = ((), ("first",), ("second",), ("first", "second"))


@pytest.mark.parametrize("numel", [1, 127, 128, 1000])
@pytest.mark.parametrize("moments", MOMENTS, ids=lambda moments: "+".join(moments) or "none")
@pytest.mark.parametrize("state_format", STATE_FORMATS)
def test_fields_fill_the_slab_without_overlap(state_format: str, moments: tuple[str, ...], numel: int) -> None:
    layout = StateLayout(StateKind(state_format, moments), numel)
    slab = torch.zeros(layout.shape, dtype=layout.dtype)
    assert slab.nbytes == layout.num_bytes
    state = layout.state(slab)
    expected = {"master", *moments}
    expected |= {f"{name}_scale" for name in moments} if state_format == "int8" else set()
    assert {name for name, _ in state.items()} == expected
    used_bytes = 0
    for i, (name, tensor) in enumerate(state.items(), start=1):
        assert tensor.numel() == (num_blocks(numel) if name.endswith("_scale") else numel)
        tensor.fill_(i)
        used_bytes += tensor.nbytes
    for i, (_, tensor) in enumerate(state.items(), start=1):
        assert bool((tensor == i).all()), "another field was written over it"
    padding_bytes = layout.num_bytes - used_bytes
    assert 0 <= padding_bytes < 64 * len(expected)
    assert state_format != "fp32" or padding_bytes == 0


@pytest.mark.parametrize("state_format", STATE_FORMATS)
def test_parts_share_memory_with_the_whole(state_format: str) -> None:
    layout = StateLayout(StateKind(state_format), 1000)
    state = layout.state(torch.zeros(layout.shape, dtype=layout.dtype))
    for tensor in (part for part in state.narrow(256, 300).tensors() if part is not None):
        tensor.fill_(1)
    for name, tensor in state.items():
        begin, numel = (2, 3) if name.endswith("_scale") else (256, 300)
        assert bool((tensor[begin : begin + numel] == 1).all())
        assert int(tensor.count_nonzero()) == numel
