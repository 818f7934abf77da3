"""Process groups for tensors of the emulated device: gloo's, through host memory.

``torch.distributed.init_process_group("sim_gloo")`` after ``sim.load()``. Data parallel training (DDP, FSDP2) of
tensors on the device then runs in several processes on one machine without an accelerator.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["BACKEND", "register"]

BACKEND = "sim_gloo"


def register() -> None:
    """Make the backend known to torch.distributed, for tensors of the device and of the CPU."""
    if dist.is_available() and BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, _create, devices=["sim", "cpu"])


def _create(store: Any, rank: int, world_size: int, timeout: datetime.timedelta) -> dist.ProcessGroup:
    return _HostProcessGroup(dist.ProcessGroupGloo(store, rank, world_size, timeout))


class _Done(dist.Work):
    """Work that was over before it was returned."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self._future: torch.futures.Future[Any] = torch.futures.Future()
        self._future.set_result(result)

    def wait(self, timeout: datetime.timedelta | None = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def get_future(self) -> torch.futures.Future[Any]:
        return self._future


def _on_host(tensor: Tensor, *, is_read: bool) -> Tensor:
    if tensor.is_cpu:
        return tensor
    return tensor.cpu() if is_read else torch.empty_like(tensor, device="cpu")


def _through_host(name: str, *, reads_first: bool = True) -> Callable[..., _Done]:
    """gloo's collective of that name on copies in host memory; what it writes, its first argument, is copied back.

    The host waits for the tensors, so no later work of the device can change them too early. ``reads_first`` is False
    where the first argument is written only: nothing need have been written to it before.
    """

    def collective(self: _HostProcessGroup, *args: Any) -> _Done:
        first = tree_map_only(Tensor, partial(_on_host, is_read=reads_first), args[:1])
        rest = tree_map_only(Tensor, partial(_on_host, is_read=True), args[1:])
        getattr(self.gloo, name)(*first, *rest).wait()
        if name != "send":
            for tensor, result in zip(tree_leaves(args[:1]), tree_leaves(first), strict=True):
                if isinstance(tensor, Tensor) and not tensor.is_cpu:
                    tensor.copy_(result)
        return _Done(args[0] if args else None)

    return collective


def _one_by_one(name: str) -> Callable[..., _Done]:
    """The collective of that name for each pair of tensors of two lists."""

    def collective(self: _HostProcessGroup, outputs: list[Tensor], inputs: list[Tensor], *args: Any) -> _Done:
        for output, given in zip(outputs, inputs, strict=True):
            getattr(self, name)(output, given, *args)
        return _Done(outputs)

    return collective


class _HostProcessGroup(dist.ProcessGroup):
    def __init__(self, gloo: Any) -> None:
        super().__init__(gloo.rank(), gloo.size())  # type: ignore[call-arg]  # torch declares another of its overloads
        self.gloo = gloo
        # Not to be called, but a group without any backend has no place for its name.
        self._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)

    def getBackendName(self) -> str:  # noqa: N802 - torch's name
        return BACKEND

    allreduce = _through_host("allreduce")
    allreduce_coalesced = _through_host("allreduce_coalesced")
    alltoall_base = _through_host("alltoall_base", reads_first=False)
    barrier = _through_host("barrier")
    broadcast = _through_host("broadcast")
    gather = _through_host("gather", reads_first=False)
    reduce = _through_host("reduce")
    reduce_scatter = _through_host("reduce_scatter", reads_first=False)
    scatter = _through_host("scatter", reads_first=False)
    recv = _through_host("recv", reads_first=False)
    send = _through_host("send")
    allgather = _through_host("allgather", reads_first=False)
    # Two names each: torch 2.13 gave these a new one.
    _allgather_base = all_gather_single = _through_host("_allgather_base", reads_first=False)
    _reduce_scatter_base = reduce_scatter_single = _through_host("_reduce_scatter_base", reads_first=False)
    allgather_into_tensor_coalesced = all_gather_single_coalesced = _one_by_one("_allgather_base")
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced = _one_by_one("_reduce_scatter_base")
