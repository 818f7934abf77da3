"""The update as a torch operator, offload::adam_step_, for tensors that only torch's dispatcher can open.

Those are tensors of a device emulated on the CPU, whose backend runs the CPU kernel of an operator when its stream
gets there, and fake or meta tensors, for which nothing is computed. Registered when this module is first imported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from offload.kernels import dispatch
from offload.kernels.scalars import AdamScalars

_library: Any = torch.library.Library("offload", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    "adam_step_(Tensor(a!) master, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor grad, Tensor(d!)? param_out, "
    "Tensor(e!)? max_exp_avg_sq, float[] scalars, str implementation, int num_threads) -> ()"
)


def _step_on_cpu(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    param_out: Tensor | None,
    max_exp_avg_sq: Tensor | None,
    scalars: list[float],
    implementation: str,
    num_threads: int,
) -> None:
    arguments = (master, exp_avg, exp_avg_sq, grad, param_out, max_exp_avg_sq)
    dispatch.run(implementation, *arguments, AdamScalars.from_list(scalars), num_threads)


def _step_on_meta(*_arguments: object) -> None:
    """Everything is in place: no output, no shape to infer."""


_library.impl("adam_step_", _step_on_cpu, "CPU")
torch.library.register_fake("offload::adam_step_", _step_on_meta, lib=_library)


@torch.no_grad()
def adam_step(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    param_out: Tensor | None,
    max_exp_avg_sq: Tensor | None,
    scalars: AdamScalars,
    implementation: str,
    num_threads: int,
) -> None:
    """One step over checked tensors, through the dispatcher."""
    arguments = (master, exp_avg, exp_avg_sq, grad, param_out, max_exp_avg_sq)
    torch.ops.offload.adam_step_(*arguments, scalars.to_list(), implementation, num_threads)
