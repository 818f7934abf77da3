"""Parameters that are spread over ranks (DTensor, as FSDP2 makes them): each rank updates the shard that it holds.

All work below the optimizer is on local tensors. What a user sees stays whole: a parameter's shape, the entries of
``optimizer.state`` (DTensors, which torch.distributed.checkpoint can reshard), the norm of all gradients.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor. Nobody has one where torch.distributed.tensor, slow to import, is not loaded."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, which shares the memory and the version counter; a plain tensor itself."""
    return tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def as_shard(shard: Tensor, param: Tensor) -> Tensor:
    """A DTensor over ``shard``, spread as ``param`` is, if that is one; else ``shard``. Both have the same shape.

    Not by ``DTensor.from_local``, which would move a shard in host memory to the mesh's device.
    """
    if not is_sharded(param):
        return shard
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    sharded: Any = param
    meta = TensorMeta(sharded.shape, sharded.stride(), shard.dtype)
    spec = DTensorSpec(sharded.device_mesh, sharded.placements, tensor_meta=meta)
    return DTensor(shard, spec, requires_grad=False)  # type: ignore[no-untyped-call]


def spread_alike(tensor: Tensor, param: Tensor) -> bool:
    """Whether both are plain, or DTensors whose shards lie on the same ranks."""
    if not (is_sharded(tensor) and is_sharded(param)):
        return is_sharded(tensor) == is_sharded(param)
    one: Any = tensor
    other: Any = param
    return bool(one.device_mesh == other.device_mesh and one.placements == other.placements)


def shard_offset(param: Tensor) -> int:
    """Where the shard's first element is in the whole parameter, flattened; 0 for a plain one."""
    if not is_sharded(param):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded: Any = param
    _, offsets = compute_local_shape_and_global_offset(sharded.shape, sharded.device_mesh, sharded.placements)
    return sum(offset * stride for offset, stride in zip(offsets, sharded.stride(), strict=True))


def true_on_all_ranks(value: bool, tensors: Iterable[Tensor]) -> bool:
    """Whether ``value`` is true on every rank that holds a shard of one of ``tensors``, which all of them must ask.

    By a flag of its own: a maximum over ranks does not keep NaN everywhere.
    """
    sharded: Any = [tensor for tensor in tensors if is_sharded(tensor)]
    for mesh in {tensor.device_mesh: None for tensor in sharded}:  # in order of the tensors, the same on each rank
        flag = torch.tensor(value, dtype=torch.int32, device=mesh.device_type)
        for dim in range(mesh.ndim):
            dist.all_reduce(flag, dist.ReduceOp.MIN, group=mesh.get_group(dim))
        value = bool(flag)
    return value
