"""update: checks its arguments, then calls the implementation that serves their device. adam_step: Adam over fp32."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from offload.kernels import native, threads, torch_reference
from offload.kernels.scalars import AdamScalars, Scalars
from offload.kernels.selection import available_implementations, default_implementation, is_available, runs_host_kernels
from offload.kernels.state import Rounding, State, check_state_format, num_blocks, row_dtypes

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NO_ROUNDING = Rounding()
# The moments of each rule: which fields of State it must have, and which it may have.
_MOMENTS = {
    "adam": ({"first", "second"}, {"max_second"}),
    "lion": ({"first"}, set()),
    "adagrad": ({"second"}, set()),
    "sgd": (set(), {"first"}),
}


def update(
    state: State,
    grad: Tensor,
    param: Tensor | None = None,
    *,
    scalars: Scalars,
    rounding: Rounding = NO_ROUNDING,
    implementation: str | None = None,
    num_threads: int | None = None,
) -> None:
    """One step of the rule that ``scalars`` belong to, in place; the same bits from every implementation and any number
    of threads.

    All tensors are 1-D, contiguous, of equal numel (0 included; scales: one a block), on one device, and don't overlap;
    no alignment is needed beyond the element's. docs/numerics.md has the formulas, the formats and the error bounds.

    Args:
        state: updated.
        grad: fp32, bfloat16 or fp16 gradient, only read: it is widened, scaled and negated in registers.
        param: fp32, bfloat16 or fp16; gets the master rounded to nearest even, NaN as NaN, in the same pass. With
            state in another format than fp32: bfloat16, required, and read first, as the master's upper half.
        scalars: the step's scalars.
        rounding: random bits for the moments in formats bf16 and int8; without use in the others.
        implementation: one of :func:`available_implementations` of the device; None: :func:`default_implementation`.
        num_threads: for CPU tensors, at most this many threads; None: :func:`offload.kernels.num_threads`. Below 2**20
            elements the calling thread works alone.

    On an accelerator the step is enqueued on the current stream.

    Raises TypeError for anything but tensors of these dtypes, ValueError for formats, shapes, devices, memory or names
    that don't fit; nothing has been written then.
    """
    check_arguments(state, grad, param, scalars.rule)
    device_type = state.master.device.type
    name = resolve_implementation(implementation, device_type)
    thread_count = resolve_threads(num_threads, state.numel)
    if runs_host_kernels(device_type) and not is_plain_cpu(state.master):
        from offload.kernels import op

        op.update(state, grad, param, scalars, rounding, name, thread_count)
    else:
        run(name, state, grad, param, scalars, rounding, thread_count)
    torch.autograd.graph.increment_version(written_by(state, param))


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
    """:func:`update` of Adam or AdamW over fp32 state; ``max_exp_avg_sq`` means amsgrad.

    Element by element the result is that of ``torch._fused_adamw_`` or ``_fused_adam_`` on the CPU.
    """
    state = State("fp32", master, exp_avg, exp_avg_sq, max_exp_avg_sq)
    update(state, grad, param_out, scalars=scalars, implementation=implementation, num_threads=num_threads)


def run(
    implementation: str,
    state: State,
    grad: Tensor,
    param: Tensor | None,
    scalars: Scalars,
    rounding: Rounding,
    num_threads: int,
) -> None:
    """One step over checked tensors by a named implementation that serves their device."""
    if state.numel == 0:
        return
    arguments = (state, grad, param, scalars, rounding)
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


def check_arguments(state: State, grad: Tensor, param: Tensor | None, rule: str) -> None:
    """Raise what :func:`update` raises for tensors that don't fit."""
    present = _present(state, grad, param)
    _check_fields(state.format, rule, tuple(tensor is None for tensor in state.tensors()))
    _check_param(state, param)
    _check_tensors(present, state)
    if is_plain_cpu(state.master) or not runs_host_kernels(state.master.device.type):
        _check_no_overlap(present)


def written_by(state: State, param: Tensor | None) -> list[Tensor]:
    """What an update writes: autograd has to be told. Kernels write through pointers, and the operator has no autograd
    kernel, so autograd doesn't see it as it sees an in-place operation.
    """
    tensors = [tensor for _, tensor in state.items()]
    return tensors if param is None else [*tensors, param]


# Adam's tensors are known by the names that adam_step and torch give them.
_NAMES = ("master", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "first_scale", "second_scale")
_SCALES = frozenset(("first_scale", "second_scale"))


def _present(state: State, grad: Tensor, param: Tensor | None) -> dict[str, Tensor]:
    tensors = {name: tensor for name, tensor in zip(_NAMES, state.tensors(), strict=True) if tensor is not None}
    tensors["grad"] = grad
    if param is not None:
        tensors["param_out"] = param
    return tensors


@functools.lru_cache(maxsize=256)
def _check_fields(state_format: str, rule: str, absent: tuple[bool, ...]) -> None:
    check_state_format(state_format)
    required, optional = _MOMENTS[rule]
    present = {name for name, is_absent in zip(State.__slots__[2:], absent[1:], strict=True) if not is_absent}
    if state_format == "int8":
        required = required | {f"{name}_scale" for name in required}
        optional = {f"{name}_scale" for name in optional & present} | optional - {"max_second"}
    elif state_format == "bf16":
        optional = optional - {"max_second"}
    if not required <= present <= required | optional:
        raise ValueError(
            f"rule {rule!r} with state_format={state_format!r} keeps {sorted(required)}"
            f"{f' and may keep {sorted(optional)}' if optional else ''}, not {sorted(present)}"
        )


def _check_param(state: State, param: Tensor | None) -> None:
    if state.is_compact and (param is None or param.dtype != torch.bfloat16):
        raise ValueError(
            f"state_format={state.format!r} keeps half of the master in a bfloat16 parameter, not in "
            f"{None if param is None else param.dtype}; use bfloat16 parameters, or state_format='fp32'"
        )


@functools.cache
def _accepted_dtypes(state_format: str) -> dict[str, tuple[torch.dtype, ...]]:
    dtypes: dict[str, tuple[torch.dtype, ...]] = {"grad": _FLOATS, "param_out": _FLOATS}
    dtypes |= {name: (dtype,) for name, dtype in zip(_NAMES, row_dtypes(state_format).values(), strict=True)}
    return dtypes


def _check_tensors(tensors: dict[str, Tensor], state: State) -> None:
    dtypes = _accepted_dtypes(state.format)
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")
        accepted = dtypes[name]
        if tensor.dtype not in accepted:
            raise TypeError(f"{name} must be of {' or '.join(map(str, accepted))}, not {tensor.dtype}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, not of layout {tensor.layout}; try {name}.to_dense()")
    master = state.master
    for name, tensor in tensors.items():
        if tensor.dim() != 1:
            raise ValueError(f"{name} must be 1-D, not of shape {tuple(tensor.shape)}; pass {name}.view(-1)")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, not of stride {tensor.stride(0)}")
        wanted = num_blocks(master.numel()) if name in _SCALES else master.numel()
        if tensor.numel() != wanted:
            if name in _SCALES:
                raise ValueError(f"{name} has {tensor.numel()} elements, not {wanted}, one a block")
            raise ValueError(f"{name} has {tensor.numel()} elements, master {wanted}: they must be equal")
        if tensor.device != master.device:
            raise ValueError(f"{name} is on {tensor.device}, master on {master.device}: they must be on one device")


def _check_no_overlap(tensors: dict[str, Tensor]) -> None:
    extents = sorted((tensor.data_ptr(), tensor.nbytes, name) for name, tensor in tensors.items())
    for (address, num_bytes, name), (next_address, _, next_name) in itertools.pairwise(extents):
        if address + num_bytes > next_address:
            raise ValueError(f"{name} and {next_name} overlap in memory: every element is read and written once")
