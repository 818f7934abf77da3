"""State formats in plain torch operations: every format to float32 rows and back, on any device.

The definition that csrc/cpu_adam/codec.inl and the others are held against; also how checkpoints change format.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offload.kernels.state import BLOCK_NUMEL, Rounding, State, num_blocks

_LARGEST_CODE = {torch.int8: 127, torch.uint8: 255}
_SMALLEST_BLOCK = 2.0**-96  # a block whose largest magnitude is less is stored as zeros
_MASK32 = 0xFFFFFFFF


@dataclass(slots=True)
class Rows:
    """State as float32 tensors, none of which shares memory with the format it was read from, but in fp32."""

    master: Tensor
    first: Tensor | None = None
    second: Tensor | None = None
    max_second: Tensor | None = None


def read_state(state: State, param: Tensor | None) -> Rows:
    """The float32 rows of ``state``; compact formats need the bfloat16 parameter that holds half of the master."""
    if not state.is_compact:
        return Rows(state.master, state.first, state.second, state.max_second)
    assert param is not None
    if state.format == "int8":
        first, second = _from_codes(state.first, state.first_scale), _from_codes(state.second, state.second_scale)
    else:
        first = None if state.first is None else state.first.float()
        second = None if state.second is None else state.second.float()
    return Rows(
        join_master(param, state.master, second),
        first,
        None if second is None else second.abs(),
        None if state.max_second is None else state.max_second.clone(),
    )


def write_state(state: State, param: Tensor | None, rows: Rows, rounding: Rounding | None) -> None:
    """Store ``rows`` in ``state`` and, if given, ``param``. ``rounding`` None: moments to nearest, halves up.

    The master's upper half is written to ``param`` only; without it, it is dropped.
    """
    if not state.is_compact:
        for name, into in state.items():
            value = getattr(rows, name)
            if into is not value:
                into.copy_(value)
        if param is not None:
            param.copy_(rows.master)
        return
    high, remainder, is_tie = split_master(rows.master)
    if param is not None:
        param.view(torch.int16).copy_(high)
    state.master.copy_(remainder)
    if state.max_second is not None and rows.max_second is not None:
        state.max_second.copy_(rows.max_second)
    random = None if rounding is None or state.format == "split16" else random_bits(state.numel, rounding, high.device)
    if state.first is not None and rows.first is not None:
        _write_moment(rows.first, random, 0, state.first, state.first_scale)
    if state.second is not None and rows.second is not None:
        bits = rows.second.view(torch.int32)
        second = (
            rows.second if state.format == "int8" else torch.where(is_tie, bits | -(2**31), bits).view(torch.float32)
        )
        _write_moment(second, random, 16, state.second, state.second_scale)


# ---- the master


def join_master(param: Tensor, remainder: Tensor, second: Tensor | None) -> Tensor:
    """The float32 master of a bfloat16 parameter, its remainder and the sign of its second moment (float32)."""
    bits = (param.view(torch.int16).to(torch.int32) << 16) + remainder.to(torch.int32)
    if second is not None:
        bits = bits + (second.view(torch.int32) < 0)
    return bits.view(torch.float32)


def split_master(master: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A float32 master as bits of its bfloat16 rounding (int16), remainder (int16) and ties (bool).

    A tie is the one value in 65536 whose remainder, +32768, is one too large: it is stored as one less. Any NaN becomes
    the canonical one.
    """
    bits = master.view(torch.int32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # wraps as unsigned arithmetic does
    high = torch.where(master.isnan(), 0x7FC0, rounded).to(torch.int16)
    dropped = torch.where(master.isnan(), 0, bits - (high.to(torch.int32) << 16))
    return high, dropped.clamp(max=0x7FFF).to(torch.int16), dropped > 0x7FFF


# ---- moments


def random_bits(numel: int, rounding: Rounding, device: torch.device) -> Tensor:
    """32 random bits an element, in int64."""
    key0, key1, first_index = rounding.words
    index = torch.arange(first_index, first_index + numel, dtype=torch.int64, device=device)
    return _mix((index + key0) & _MASK32) ^ key1


def _mix(x: Tensor) -> Tensor:
    """C. Wellons's "lowbias32" on 32-bit values held in int64; products keep their low bits when they wrap."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)


def _write_moment(row: Tensor, random: Tensor | None, shift: int, into: Tensor, scale: Tensor | None) -> None:
    if scale is not None:
        _to_codes(row, random, shift, into, scale)
    elif into.dtype == torch.float32:
        into.copy_(row)
    else:
        into.view(torch.int16).copy_(_to_bfloat16(row, random, shift))


def _threshold(random: Tensor | None, shift: int) -> Tensor | int:
    """16 bits an element: what is dropped rounds up if it exceeds them."""
    return 0x8000 if random is None else (random >> shift) & 0xFFFF


def _to_bfloat16(row: Tensor, random: Tensor | None, shift: int) -> Tensor:
    bits = row.view(torch.int32).to(torch.int64)
    rounded = (bits + _threshold(random, shift)) >> 16
    return torch.where(row.isnan(), 0x7FC0, rounded).to(torch.int16)


def _from_codes(codes: Tensor | None, scale: Tensor | None) -> Tensor | None:
    if codes is None or scale is None:
        return None
    wide = codes.to(torch.int32)
    return (wide * wide.abs()).float() * scale.repeat_interleave(BLOCK_NUMEL)[: codes.numel()]


def _to_codes(row: Tensor, random: Tensor | None, shift: int, codes: Tensor, scale: Tensor) -> None:
    largest_code, numel = _LARGEST_CODE[codes.dtype], row.numel()
    magnitude = row.abs()
    padded = torch.nn.functional.pad(magnitude, (0, num_blocks(numel) * BLOCK_NUMEL - numel))
    largest = padded.view(-1, BLOCK_NUMEL).amax(1)
    is_zero = largest < _SMALLEST_BLOCK
    # Division by a tensor: torch's accelerator kernels divide by a host scalar as a product with its reciprocal.
    exact = largest / torch.full_like(largest, float(largest_code**2))
    scale.copy_(torch.where(largest.isfinite(), torch.where(is_zero, 0.0, exact), torch.nan))
    inverse = torch.where(largest.isfinite() & ~is_zero, torch.ones_like(exact) / exact, 0.0)
    square = magnitude * inverse.repeat_interleave(BLOCK_NUMEL)[:numel]
    square = torch.where(square.isfinite(), square, 0.0)  # infinity and NaN times 0: their whole block is NaN
    below = square.double().sqrt().float().to(torch.int32)  # correctly rounded, see torch_reference
    threshold = torch.as_tensor(_threshold(random, shift), device=row.device).float() * 2.0**-16
    is_up = square - (below * below).float() > threshold * (2 * below + 1).float()
    code = (below + is_up).clamp(max=largest_code)
    if codes.dtype == torch.int8:
        code = torch.where(row.view(torch.int32) < 0, -code, code)
    else:  # of a second moment only zero is stored as zero: it divides
        nonzero = (row != 0) & (inverse != 0).repeat_interleave(BLOCK_NUMEL)[:numel]
        code = torch.where((code == 0) & nonzero, 1, code)
    codes.copy_(code)
