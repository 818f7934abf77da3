"""The update as a torch operator, offload::update_, for tensors that only torch's dispatcher can open.

Those are tensors of a device emulated on the CPU, whose backend runs the CPU kernel of an operator when its stream
gets there, and fake or meta tensors, for which nothing is computed. Registered when this module is first imported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from offload.kernels import dispatch
from offload.kernels.rules import RULES
from offload.kernels.scalars import Scalars
from offload.kernels.state import Rounding, State

_library: Any = torch.library.Library("offload", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    "update_(str state_format, Tensor(a!) master, Tensor(b!)? first, Tensor(c!)? second, Tensor(d!)? max_second, "
    "Tensor(e!)? first_scale, Tensor(f!)? second_scale, Tensor grad, Tensor(g!)? param, str rule, float[] scalars, "
    "int[] rounding, str implementation, int num_threads) -> ()"
)


def _update_on_cpu(
    state_format: str,
    master: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    max_second: Tensor | None,
    first_scale: Tensor | None,
    second_scale: Tensor | None,
    grad: Tensor,
    param: Tensor | None,
    rule: str,
    scalars: list[float],
    rounding: list[int],
    implementation: str,
    num_threads: int,
) -> None:
    state = State(state_format, master, first, second, max_second, first_scale, second_scale)
    low, high, first_index = rounding
    step_scalars = RULES[rule].from_list(scalars)
    dispatch.run(implementation, state, grad, param, step_scalars, Rounding(high << 32 | low, first_index), num_threads)


def _update_on_meta(*_arguments: object) -> None:
    """Everything is in place: no output, no shape to infer."""


_library.impl("update_", _update_on_cpu, "CPU")
torch.library.register_fake("offload::update_", _update_on_meta, lib=_library)


@torch.no_grad()
def update(
    state: State,
    grad: Tensor,
    param: Tensor | None,
    scalars: Scalars,
    rounding: Rounding,
    implementation: str,
    num_threads: int,
) -> None:
    """One step over checked tensors, through the dispatcher."""
    how = (scalars.rule, scalars.to_list(), list(rounding.words), implementation, num_threads)
    torch.ops.offload.update_(state.format, *state.tensors(), grad, param, *how)
