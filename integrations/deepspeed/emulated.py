"""DeepSpeed on the emulated device: an accelerator for ``set_accelerator``, and process groups that know the device.

DeepSpeed's own ZeRO-Offload and the plugin then run asynchronously, on the same emulated hardware, without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch import Tensor
from torch._C._distributed_c10d import HashStore, Store, Work

from offload.testing import sim

BACKEND = "emulated"
DEVICE = "sim"
_TENSOR_DTYPES = {
    "BFloat16Tensor": torch.bfloat16, "ByteTensor": torch.uint8, "DoubleTensor": torch.double,
    "FloatTensor": torch.float, "HalfTensor": torch.half, "IntTensor": torch.int, "LongTensor": torch.long,
}  # fmt: skip
# What DeepSpeed compiles for its CPU accelerator to run collectives in shared memory; the groups here do without.
_NOT_BUILT = ("ShareMemCommBuilder",)


class EmulatedAccelerator(CPU_Accelerator):  # type: ignore[misc]  # DeepSpeed has no types
    """One emulated device: asynchronous, with streams, events and memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._name = DEVICE
        self._communication_backend_name = BACKEND

    def __getattribute__(self, name: str) -> Any:
        dtype = _TENSOR_DTYPES.get(name)
        return (
            super().__getattribute__(name)
            if dtype is None
            else functools.partial(torch.tensor, dtype=dtype, device=DEVICE)
        )

    def is_synchronized_device(self) -> bool:
        return False

    def device_name(self, device_index: int | None = None) -> str:
        return DEVICE if device_index is None else f"{DEVICE}:{device_index}"

    def device(self, device_index: int | None = None) -> torch.device:
        return torch.device(DEVICE, 0)

    def current_device(self) -> int:
        return 0

    def current_device_name(self) -> str:
        return f"{DEVICE}:0"

    def device_count(self) -> int:
        return 1

    def synchronize(self, device_index: int | None = None) -> None:
        torch.accelerator.synchronize()

    def manual_seed(self, seed: int) -> None:
        torch.get_device_module(DEVICE).manual_seed(seed)

    manual_seed_all = manual_seed

    def get_rng_state(self, device_index: int | None = None) -> Tensor:
        state: Tensor = torch.get_device_module(DEVICE).get_rng_state()
        return state

    def set_rng_state(self, new_state: Tensor, device_index: int | None = None) -> None:
        torch.get_device_module(DEVICE).set_rng_state(new_state)

    @property
    def Stream(self) -> Callable[..., torch.Stream]:  # noqa: N802 - DeepSpeed's name
        return functools.partial(torch.Stream, device=DEVICE)

    def stream(self, stream: torch.Stream | None) -> Any:
        return contextlib.nullcontext() if stream is None else stream

    def current_stream(self, device_index: int | None = None) -> torch.Stream:
        return torch.accelerator.current_stream()

    def default_stream(self, device_index: int | None = None) -> torch.Stream:
        return torch.Stream(stream_id=0, device_index=0, device_type=torch._C._autograd.DeviceType.PrivateUse1.value)

    @property
    def Event(self) -> Callable[..., torch.Event]:  # noqa: N802 - DeepSpeed's name
        def event(enable_timing: bool = False, **_: Any) -> torch.Event:
            return torch.Event(device=DEVICE, enable_timing=enable_timing)

        return event

    def empty_cache(self) -> None:
        torch.accelerator.empty_cache()

    def memory_allocated(self, device_index: int | None = None) -> int:
        return torch.accelerator.memory_allocated()

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        return torch.accelerator.max_memory_allocated()

    def reset_peak_memory_stats(self, device_index: int | None = None) -> None:
        torch.accelerator.reset_peak_memory_stats()

    reset_max_memory_allocated = reset_max_memory_cached = reset_peak_memory_stats

    def memory_reserved(self, device_index: int | None = None) -> int:
        return torch.accelerator.memory_reserved()

    def max_memory_reserved(self, device_index: int | None = None) -> int:
        return torch.accelerator.max_memory_reserved()

    memory_cached, max_memory_cached = memory_reserved, max_memory_reserved

    def memory_stats(self, device_index: int | None = None) -> dict[str, Any]:
        return torch.accelerator.memory_stats()

    def total_memory(self, device_index: int | None = None) -> int:
        return torch.accelerator.get_memory_info()[1]

    def available_memory(self, device_index: int | None = None) -> int:
        return torch.accelerator.get_memory_info()[0]

    def pin_memory(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor.pin_memory()

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.is_pinned()

    def on_accelerator(self, tensor: Tensor) -> bool:
        return tensor.device.type == DEVICE

    def supported_dtypes(self) -> list[torch.dtype]:
        return [torch.float, torch.half, torch.bfloat16]

    def is_fp16_supported(self) -> bool:
        return True

    def create_op_builder(self, op_name: str) -> Any:
        return None if op_name in _NOT_BUILT else super().create_op_builder(op_name)


class _Done(Work):
    """A collective that is enqueued in stream order, or done."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self._future: torch.futures.Future[Any] = torch.futures.Future()
        self._future.set_result(result)

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def get_future(self) -> torch.futures.Future[Any]:
        return self._future


class LoopbackGroup(dist.ProcessGroup):
    """A world of one: collectives are copies on the current stream, or nothing."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]  # the overload for Python's groups is not in the stub

    def getBackendName(self) -> str:  # noqa: N802 - torch's name
        return BACKEND

    def _in_place(self, tensors: Any, opts: Any = None) -> Work:
        return _Done(tensors)

    allreduce = allreduce_coalesced = broadcast = reduce = _in_place  # type: ignore[assignment]

    def barrier(self, opts: Any = None) -> Work:
        return _Done(None)

    def _copy_one(self, output: Tensor, value: Tensor, opts: Any = None) -> Work:
        output.copy_(value.view_as(output))
        return _Done(output)

    _allgather_base = all_gather_single = _reduce_scatter_base = reduce_scatter_single = _copy_one  # type: ignore[assignment]

    def _copy_each(self, outputs: list[Tensor], values: list[Tensor], opts: Any = None) -> Work:
        for output, value in zip(outputs, values, strict=True):
            output.copy_(value.view_as(output))
        return _Done(outputs)

    allgather_into_tensor_coalesced = reduce_scatter_tensor_coalesced = _copy_each  # type: ignore[assignment]

    def allgather(self, outputs: Any, values: Any, opts: Any = None) -> Work:
        return self._copy_each([output[0] for output in outputs], values)

    def reduce_scatter(self, outputs: Any, values: Any, opts: Any = None) -> Work:  # type: ignore[override]
        return self._copy_each(outputs, [value[0] for value in values])

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def _group(_store: Store, rank: int, size: int, _timeout: timedelta) -> dist.ProcessGroup:
    if size != 1:
        raise ValueError(
            f"the emulated device has a world of one, not {size}; run ranks on DeepSpeed's CPU accelerator"
        )
    return LoopbackGroup(rank, size)


def use_emulated_device() -> None:
    """Load the emulated device, make it DeepSpeed's accelerator, and start a world of one. Calling it again is free."""
    if isinstance(get_accelerator(), EmulatedAccelerator):
        return
    sim.load()
    set_accelerator(EmulatedAccelerator())
    os.environ.setdefault("LOCAL_RANK", "0")
    dist.Backend.register_backend(BACKEND, _group, devices=["cpu", DEVICE])
    dist.init_process_group(BACKEND, store=HashStore(), rank=0, world_size=1)
