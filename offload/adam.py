"""What the operations of a plan do to the tensors of one subgroup, for Adam and AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offload.accelerators import Accelerator
from offload.kernels import AdamScalars, adam_step
from offload.subgroup import Slot, Staging


@dataclass(frozen=True, slots=True)
class ParamSlice:
    """One whole parameter within a subgroup: ``numel`` elements from ``offset`` of the flat state."""

    param: Tensor
    offset: int
    numel: int

    def within(self, flat: Tensor) -> Tensor:
        return flat.narrow(-1, self.offset, self.numel)


@dataclass(frozen=True, slots=True)
class SliceUpdate:
    """What one step does to one parameter: flat gradient and flat parameter on the device, and the step's scalars.

    ``param`` shares the parameter's storage and version counter. It is taken before the step: what the step does must
    not touch the parameter itself, which may be pending (:mod:`offload.pending`) by then.
    """

    slice: ParamSlice
    grad: Tensor
    param: Tensor
    scalars: AdamScalars


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring parameters that are updated with the same scalars, so by one call of the kernel."""

    begin: int
    end: int
    scalars: AdamScalars


class AdamSubgroup:
    """State of one subgroup and the operations on it (:class:`offload.subgroup.Actions`).

    Args:
        slices: the parameters, in order, packed without gaps.
        dtype: of the parameters and their gradients.
        state: (rows, numel) float32, on the host or (resident) on the device. Rows are master, exp_avg, exp_avg_sq
            and, with amsgrad, max_exp_avg_sq.
        accelerator: told what the host update touches; None for parameters on the CPU.
    """

    def __init__(
        self, slices: Sequence[ParamSlice], dtype: torch.dtype, state: Tensor, accelerator: Accelerator | None
    ) -> None:
        self.slices = tuple(slices)
        self.dtype = dtype
        self.state = state
        self._accelerator = accelerator
        self._updates: tuple[SliceUpdate, ...] = ()
        self._grads: tuple[tuple[ParamSlice, Tensor], ...] = ()
        self._runs: tuple[_Run, ...] = ()

    def begin_step(self, updates: Sequence[SliceUpdate]) -> None:
        """Set what this step updates: the parameters that have a gradient, in order."""
        self._updates = tuple(updates)
        self.begin_gradients([(update.slice, update.grad) for update in updates])
        runs: list[_Run] = []
        for update in updates:
            begin, end = update.slice.offset, update.slice.offset + update.slice.numel
            if runs and runs[-1].end == begin and runs[-1].scalars == update.scalars:
                begin = runs.pop().begin
            runs.append(_Run(begin, end, update.scalars))
        self._runs = tuple(runs)

    def begin_gradients(self, grads: Sequence[tuple[ParamSlice, Tensor]]) -> None:
        """Set the flat gradients that go down, in order: those of the step, also before it."""
        self._grads = tuple(grads)

    def end_step(self) -> None:
        """Let go of the gradients. Every use of them is ordered before the next forward on the compute lane."""
        self._updates = self._grads = ()

    # Order and lifetime: see [Note: who waits for what] in offload/executor.py.
    def grad_down(self, staging: Staging) -> None:
        grad = self._typed(staging.grad)
        for item, from_device in self._grads:
            item.within(grad).copy_(from_device, non_blocking=True)

    def update_cpu(self, staging: Staging) -> None:
        grad, param = self._typed(staging.grad), self._typed(staging.param)
        if self._accelerator is not None:
            self._accelerator.declare_host_work("cpu update", reads=(grad,), writes=(self.state, param))
        for run in self._runs:
            part = slice(run.begin, run.end)
            self._adam_step(self.state[:, part], grad[part], param[part], run.scalars)

    def upload(self, staging: Staging) -> None:
        param = self._typed(staging.param)
        for update in self._updates:
            update.param.copy_(update.slice.within(param), non_blocking=True)

    def prefetch(self, slot: Slot) -> None:
        self._in_slot(slot).copy_(self.state, non_blocking=True)

    def update_gpu(self, slot: Slot) -> None:
        self._update_on_device(self._in_slot(slot))

    def flush(self, slot: Slot) -> None:
        self.state.copy_(self._in_slot(slot), non_blocking=True)

    def update_resident(self) -> None:
        self._update_on_device(self.state)

    def _update_on_device(self, state: Tensor) -> None:
        for update in self._updates:
            self._adam_step(update.slice.within(state), update.grad, update.param, update.scalars)

    def _adam_step(self, state: Tensor, grad: Tensor, param_out: Tensor, scalars: AdamScalars) -> None:
        master, exp_avg, exp_avg_sq, *amsgrad = state.unbind()
        adam_step(master, exp_avg, exp_avg_sq, grad, param_out, *amsgrad, scalars=scalars)

    def _in_slot(self, slot: Slot) -> Tensor:
        assert slot.buffer is not None
        return slot.buffer[: self.state.numel()].view_as(self.state)

    def _typed(self, staging: Tensor | None) -> Tensor:
        assert staging is not None
        return staging[: self.state.shape[1] * self.dtype.itemsize].view(self.dtype)


def flat(param: Tensor) -> Tensor:
    """A flat view that shares the parameter's storage and version counter, outside autograd."""
    return param.detach().view(-1)


def read_master(actions: AdamSubgroup, item: ParamSlice) -> None:
    """Take a parameter's value from the device into its float32 master.

    Where the parameter still is the rounded master, bit for bit, the master keeps what the rounding dropped: so a
    user's edit of a parameter wins, and a checkpoint's master survives loading the model after the optimizer.
    """
    master = item.within(actions.state[0])
    param = flat(item.param).to(master.device)
    bits = torch.int32 if param.itemsize == 4 else torch.int16
    unchanged = master.to(param.dtype).view(bits) == param.view(bits)
    torch.where(unchanged, master, param.float(), out=master)
