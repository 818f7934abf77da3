"""adam_step: checks its arguments, then calls the implementation that serves their device."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from offload.kernels import native, threads, torch_reference
from offload.kernels.scalars import AdamScalars
from offload.kernels.selection import available_implementations, default_implementation, is_available, runs_host_kernels

_STATE = (torch.float32,)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def adam_step(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    param_out: Tensor | None = None,
    max_exp_avg_sq: Tensor | None = None,
    *,
    scalars: AdamScalars,
    implementation: str | None = None,
    num_threads: int | None = None,
) -> None:
    """One Adam or AdamW step, in place, the same bits from every implementation and any number of threads.

    All tensors are 1-D, contiguous, of equal numel (0 included), on one device, and don't overlap; no alignment is
    needed beyond the element's. Element by element the result is that of ``torch._fused_adamw_`` or ``_fused_adam_``
    on the CPU (docs/numerics.md has the formula and the error bounds).

    Args:
        master: fp32 parameters, updated.
        exp_avg: fp32 first moment, updated.
        exp_avg_sq: fp32 second moment, updated.
        grad: fp32, bfloat16 or fp16 gradient, only read: it is widened, scaled and negated in registers.
        param_out: fp32, bfloat16 or fp16; gets ``master`` rounded to nearest even, NaN as NaN, in the same pass.
        max_exp_avg_sq: fp32 running maximum of the second moment, updated; giving it means amsgrad.
        scalars: the step's scalars, from :meth:`AdamScalars.at_step`.
        implementation: one of :func:`available_implementations` of the device; None: :func:`default_implementation`.
        num_threads: for CPU tensors, at most this many threads; None: :func:`offload.kernels.num_threads`. Below 2**20
            elements the calling thread works alone.

    On an accelerator the step is enqueued on the current stream.

    Raises TypeError for anything but tensors of these dtypes, ValueError for shapes, devices, memory or names that
    don't fit; nothing has been written then.
    """
    arguments = (master, exp_avg, exp_avg_sq, grad, param_out, max_exp_avg_sq)
    check_arguments(*arguments)
    device_type = master.device.type
    name = resolve_implementation(implementation, device_type)
    thread_count = resolve_threads(num_threads, master.numel())
    if runs_host_kernels(device_type) and not is_plain_cpu(master):
        from offload.kernels import op

        op.adam_step(*arguments, scalars, name, thread_count)
    else:
        run(name, *arguments, scalars, thread_count)
    # Kernels write through pointers, and the operator has no autograd kernel: autograd has to be told, as it would be
    # of an in-place operation.
    written = (master, exp_avg, exp_avg_sq, param_out, max_exp_avg_sq)
    torch.autograd.graph.increment_version([tensor for tensor in written if tensor is not None])


def run(
    implementation: str,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    param_out: Tensor | None,
    max_exp_avg_sq: Tensor | None,
    scalars: AdamScalars,
    num_threads: int,
) -> None:
    """One step over checked tensors by a named implementation that serves their device."""
    if master.numel() == 0:
        return
    arguments = (master, exp_avg, exp_avg_sq, grad, param_out, max_exp_avg_sq, scalars)
    if implementation == "torch":
        torch_reference.step(*arguments)
    elif implementation == "numba":
        from offload.kernels import numba_kernel

        numba_kernel.step(*arguments, num_threads)
    elif implementation == "triton":
        from offload.kernels import triton_kernel

        triton_kernel.step(*arguments)
    else:
        kernel = native.load()
        assert kernel is not None, implementation
        kernel.step(implementation, *arguments, num_threads)


def is_plain_cpu(tensor: Tensor) -> bool:
    """Whether a tensor's memory may be handed to a kernel: it isn't fake, nor a subclass that wraps another."""
    return tensor.device.type == "cpu" and type(tensor) in (Tensor, torch.nn.Parameter)


def resolve_implementation(implementation: str | None, device_type: str) -> str:
    if implementation is None:
        return default_implementation(device_type)
    if not is_available(implementation, device_type):
        raise ValueError(
            f"implementation {implementation!r} is not available for tensors on {device_type!r}; "
            f"choose one of {', '.join(available_implementations(device_type))}"
        )
    return implementation


def resolve_threads(num_threads: int | None, numel: int) -> int:
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"num_threads must be at least 1, not {num_threads!r} (None for the default)")
    if numel < threads.MIN_PARALLEL_NUMEL:
        return 1
    return threads.num_threads() if num_threads is None else num_threads


def check_arguments(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    param_out: Tensor | None,
    max_exp_avg_sq: Tensor | None,
) -> None:
    """Raise what :func:`adam_step` raises for tensors that don't fit."""
    tensors = {
        "master": master,
        "exp_avg": exp_avg,
        "exp_avg_sq": exp_avg_sq,
        "param_out": param_out,
        "max_exp_avg_sq": max_exp_avg_sq,
        "grad": grad,
    }
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    _check_tensors(present)
    if is_plain_cpu(master) or not runs_host_kernels(master.device.type):
        _check_no_overlap(present)


def _check_tensors(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")
        accepted = _FLOATS if name in ("grad", "param_out") else _STATE
        if tensor.dtype not in accepted:
            raise TypeError(f"{name} must be of {' or '.join(map(str, accepted))}, not {tensor.dtype}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, not of layout {tensor.layout}; try {name}.to_dense()")
    master = tensors["master"]
    for name, tensor in tensors.items():
        if tensor.dim() != 1:
            raise ValueError(f"{name} must be 1-D, not of shape {tuple(tensor.shape)}; pass {name}.view(-1)")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, not of stride {tensor.stride(0)}")
        if tensor.numel() != master.numel():
            raise ValueError(f"{name} has {tensor.numel()} elements, master {master.numel()}: they must be equal")
        if tensor.device != master.device:
            raise ValueError(f"{name} is on {tensor.device}, master on {master.device}: they must be on one device")


def _check_no_overlap(tensors: dict[str, Tensor]) -> None:
    extents = sorted((tensor.data_ptr(), tensor.nbytes, name) for name, tensor in tensors.items())
    for (address, num_bytes, name), (next_address, _, next_name) in itertools.pairwise(extents):
        if address + num_bytes > next_address:
            raise ValueError(f"{name} and {next_name} overlap in memory: every element is read and written once")
