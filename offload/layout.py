"""How parameters are packed into subgroups, and which parameters can be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offload.adam import ParamSlice
from offload.pending import PendingTensor
from offload.shards import is_sharded, local, spread_alike
from offload.state_layout import StateKind
from offload.watched import WatchedTensor

PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEFAULT_NUM_SUBGROUPS = 24  # enough to overlap transfers with updates; more only adds launches
MIN_SUBGROUP_NUMEL = 2**20  # below this a transfer is latency and a CPU update runs on one thread
MAX_SUBGROUP_NUMEL = 10**8  # the paper's subgroup size (arXiv 2410.21316)


@dataclass(frozen=True, slots=True)
class Packed:
    """Parameters of one subgroup: same parameter group, same dtype, packed without gaps but for alignment.

    ``state`` is host memory that the caller gives the subgroup for its state, (rows, numel) float32, each row
    contiguous, pinned if the state may visit the device; None lets the runtime allocate it.
    """

    group_index: int
    dtype: torch.dtype
    slices: tuple[ParamSlice, ...]
    state: Tensor | None = None

    @property
    def numel(self) -> int:
        return self.slices[-1].offset + self.slices[-1].numel


def check_param(param: Tensor, name: str, device: torch.device) -> None:
    """Raise ValueError, naming the parameter, if it cannot be offloaded from ``device``."""
    if param.device != device:
        raise ValueError(
            f"parameter {name} is on {param.device} but this optimizer's device is {device}; "
            f"move the model to one device before constructing the optimizer, and leave it there"
        )
    shard = local(param.data)
    if (type(param) not in (Tensor, nn.Parameter) and not is_sharded(param)) or type(shard) is not Tensor:
        raise ValueError(
            f"parameter {name} is a {type(shard).__name__}; only plain tensors and DTensors of them can be offloaded: "
            f"construct the optimizer over the tensors inside, or before the model is wrapped"
        )
    if param.dtype not in PARAM_DTYPES:
        raise ValueError(
            f"parameter {name} has dtype {param.dtype}; supported are {', '.join(map(str, PARAM_DTYPES))}: "
            f"convert it, or give it to another optimizer"
        )
    if shard.layout is not torch.strided or not shard.is_contiguous():
        raise ValueError(
            f"parameter {name} of shape {tuple(shard.shape)} is not contiguous (strides {shard.stride()}); "
            f"make it so first: param.data = param.data.contiguous()"
        )


def check_state_kind(kind: StateKind, param: Tensor, name: str) -> None:
    """Raise ValueError, naming the parameter, if its state cannot be kept in the format asked for."""
    if kind.master_in_param and param.dtype != torch.bfloat16:
        raise ValueError(
            f"state_format={kind.format!r} keeps half of each float32 master in a bfloat16 parameter, but parameter "
            f"{name} has dtype {param.dtype}; convert the model to bfloat16, give this parameter to another optimizer, "
            f"or use state_format='fp32'"
        )
    if kind.format == "int8" and is_sharded(param):
        raise ValueError(
            f"state_format='int8' keeps scales for blocks of 128 elements, which cannot be moved to another number of "
            f"ranks, and parameter {name} is a DTensor; use state_format='bf16'"
        )
    if "max_second" in kind.moments and kind.rounds:
        raise ValueError(
            f"amsgrad=True is not available with state_format={kind.format!r}, whose rounding would let the maximum "
            f"drift upward; use state_format='fp32' or 'split16', or leave amsgrad out"
        )


def check_overlap(overlap: str, param: Tensor, name: str) -> None:
    """Raise ValueError, naming the parameter, if its reads cannot be seen and so an update cannot run beside them."""
    if overlap != "none" and is_sharded(param):
        raise ValueError(
            f"overlap={overlap!r} is not available for parameter {name}, a DTensor: FSDP2 gathers shards through "
            "memory of its own, which cannot be made to wait; use overlap='auto' or 'none'"
        )


def check_grad(grad: Tensor, param: Tensor, name: str) -> None:
    """Raise if the kernels cannot take a gradient."""
    if is_sharded(grad) and not spread_alike(grad, param):
        raise RuntimeError(
            f"the gradient of parameter {name} is a DTensor that is not spread as the parameter is: "
            f"redistribute it to {getattr(param, 'placements', 'a plain tensor')}"
        )
    grad = local(grad)
    if not isinstance(grad, (PendingTensor, WatchedTensor)) and type(grad) not in (Tensor, nn.Parameter):
        raise RuntimeError(
            f"the gradient of parameter {name} is a {type(grad).__name__}; only plain tensors are taken: "
            f"set param.grad to the local tensor"
        )
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"the gradient of parameter {name} is sparse ({grad.layout}), which is not supported here; "
            f"use torch.optim.SparseAdam for it, or an embedding with sparse=False"
        )
    if grad.dtype != param.dtype:
        raise RuntimeError(
            f"the gradient of parameter {name} has dtype {grad.dtype}, its parameter {param.dtype}; "
            f"gradients are taken in the parameter's own dtype: cast the gradient, or clear param.grad_dtype"
        )


def resolve_subgroup_numel(subgroup_numel: int | None, total_numel: int) -> int:
    """The subgroup size to pack for, from the user's wish and the trainable parameters of the model."""
    if subgroup_numel is None:
        return min(max(total_numel // DEFAULT_NUM_SUBGROUPS, MIN_SUBGROUP_NUMEL), MAX_SUBGROUP_NUMEL)
    if not isinstance(subgroup_numel, int) or isinstance(subgroup_numel, bool):
        raise TypeError(f"subgroup_numel must be an int or None, not {subgroup_numel!r}")
    if not 1 <= subgroup_numel <= max(total_numel, 1):
        raise ValueError(
            f"subgroup_numel={subgroup_numel} is out of range: the model has {total_numel} trainable parameters, "
            f"so give 1 to {max(total_numel, 1)}, or None to let the runtime choose"
        )
    return subgroup_numel


def pack(
    group_index: int,
    params: Iterable[Tensor],
    subgroup_numel: int,
    *,
    alignment: int = 1,
    numbers: Mapping[Tensor, int] | None = None,
) -> list[Packed]:
    """Pack whole parameters, in order and by dtype, into subgroups of about ``subgroup_numel`` elements.

    A subgroup is closed when the next parameter would exceed that size, unless it is not half full: so a parameter
    larger than the size takes small neighbours with it. Empty parameters have nothing to update and are left out.

    Args:
        alignment: each parameter begins at a multiple of it.
        numbers: of each parameter's first element, see :class:`ParamSlice`; None: 0 for all.
    """
    by_dtype: dict[torch.dtype, list[list[Tensor]]] = {}
    for param in params:
        numel = local(param).numel()
        if numel == 0:
            continue
        runs = by_dtype.setdefault(param.dtype, [[]])
        filled = sum(local(p).numel() for p in runs[-1])
        if filled + numel > subgroup_numel and 2 * filled >= subgroup_numel:
            runs.append([])
        runs[-1].append(param)
    return [
        Packed(group_index, dtype, _slices(run, alignment, numbers or {}))
        for dtype, runs in by_dtype.items()
        for run in runs
    ]


def _slices(params: Sequence[Tensor], alignment: int, numbers: Mapping[Tensor, int]) -> tuple[ParamSlice, ...]:
    slices, end = [], 0
    for param in params:
        offset = -(-end // alignment) * alignment
        slices.append(ParamSlice(param, offset, local(param).numel(), numbers.get(param, 0)))
        end = offset + slices[-1].numel
    return tuple(slices)
