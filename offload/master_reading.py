"""Parameters' values on their way into the float32 masters."""

from __future__ import annotations

import torch
from torch import Tensor

from offload.adam import AdamSubgroup, ParamSlice, drop_remainder, flat
from offload.kernels import State
from offload.kernels.codec import join_master

PIECE_NUMEL = 1 << 18  # of a parameter that is read at a time
_INTEGERS = {2: torch.int16, 4: torch.int32}


class MasterReader:
    """Takes parameters' values into their masters, piece by piece.

    Where the parameter still is the rounded master, bit for bit, the master keeps what the rounding dropped: so a
    user's edit of a parameter wins, and a checkpoint's master survives loading the model after the optimizer.

    Where half of the master is the parameter itself, nothing is left to compare with: the remainder is kept wherever
    parameter and remainder make a master that rounds to the parameter.

    In host memory everything goes through four buffers, of 13 bytes an element, that live as long as the reader.
    Temporaries of one size after another, with a copy from the device between them, are what glibc's aligned
    allocation (before 2.38) finds no second use for: they left the process with a fifth more than the whole state.
    """

    def __init__(self) -> None:
        self._from_device = torch.empty(PIECE_NUMEL)
        self._wide = torch.empty(PIECE_NUMEL)
        self._other = torch.empty(PIECE_NUMEL)
        self._flags = torch.empty(PIECE_NUMEL, dtype=torch.bool)

    def read(self, actions: AdamSubgroup, item: ParamSlice) -> None:
        """Read one parameter. Nothing is in flight."""
        state, param = actions.state_of(item), flat(item.param)
        for begin in range(0, item.numel, PIECE_NUMEL):
            numel = min(PIECE_NUMEL, item.numel - begin)
            part, source = state.narrow(begin, numel), param.narrow(0, begin, numel)
            if part.master.device.type != "cpu":
                _read_on_device(part, source)
                continue
            if source.device.type != "cpu":
                source = self._from_device.view(source.dtype)[:numel].copy_(source)
            if part.is_compact:
                self._read_compact(part, source)
            else:
                self._read_fp32(part, source)

    def _read_fp32(self, state: State, param: Tensor) -> None:
        numel, integers = state.numel, _INTEGERS[param.itemsize]
        if param.dtype == torch.float32:
            rounded, wide = state.master, param
        else:
            rounded = self._other.view(param.dtype)[:numel].copy_(state.master)
            wide = self._wide[:numel].copy_(param)
        unchanged = torch.eq(rounded.view(integers), param.view(integers), out=self._flags[:numel])
        torch.where(unchanged, state.master, wide, out=state.master)

    def _read_compact(self, state: State, param: Tensor) -> None:
        """As :func:`_read_on_device` does. No operation mixes dtypes: it would allocate."""
        numel, second = state.numel, None if state.format == "int8" else state.second
        flags, other = self._flags[:numel], self._other.view(torch.int32)[:numel]
        bits = self._wide.view(torch.int32)[:numel].copy_(param.view(torch.int16)).bitwise_left_shift_(16)
        bits += other.copy_(state.master)
        if second is not None:
            bits += other.copy_(torch.lt(second.view(_INTEGERS[second.itemsize]), 0, out=flags))
        rounded = self._other.view(torch.bfloat16)[:numel].copy_(bits.view(torch.float32))
        changed = torch.ne(rounded.view(torch.int16), param.view(torch.int16), out=flags)
        state.master.masked_fill_(changed, 0)
        if second is not None:
            torch.where(changed, torch.abs(second, out=self._other.view(second.dtype)[:numel]), second, out=second)


def _read_on_device(state: State, param: Tensor) -> None:
    if not state.is_compact:
        integers = _INTEGERS[param.itemsize]
        unchanged = state.master.to(param.dtype).view(integers) == param.view(integers)
        torch.where(unchanged, state.master, param.float(), out=state.master)
        return
    second = None if state.second is None or state.format == "int8" else state.second.float()
    joined = join_master(param, state.master, second)
    drop_remainder(state, joined.to(param.dtype).view(torch.int16) != param.view(torch.int16))
