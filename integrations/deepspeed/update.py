"""What both ZeRO optimizers share: the update of a rank's flat parameters with the groups of a torch optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from offload.options import Options
from offload.pending import make_pending, make_plain

from .adam_groups import check_group, is_decoupled, scalars_at, state_entries
from .partition import Alias, FlatPartition


class ShardUpdate:
    """Flat parameters of one rank, their state under the optimizer's names, and the step.

    Args:
        optimizer: holds parameter groups and, from now on, views of our state.
        flats: this rank's parameters; see :class:`FlatPartition`.
        group_of: the parameter group of each.
        max_subgroup_numel: see :class:`FlatPartition`.

    Attributes:
        masters: one float32 tensor for each flat one, which the optimizer's state is keyed by.

    Raises:
        TypeError, ValueError: for an optimizer or options that cannot be offloaded.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        flats: Sequence[Tensor],
        group_of: Sequence[int],
        options: Options,
        *,
        max_subgroup_numel: int | None = None,
    ) -> None:
        self._decoupled = is_decoupled(optimizer)
        self._optimizer = optimizer
        self._group_of = tuple(group_of)
        for group in optimizer.param_groups:
            check_group(group)
            group.setdefault("bias_correction", True)  # DeepSpeedCPUAdam, loading our checkpoint, looks for it
        self.partition = FlatPartition(flats, options, max_subgroup_numel=max_subgroup_numel)
        self._entries = state_entries(optimizer, self.partition.states)
        self._scaled_by: tuple[Tensor | None, float] | None = None
        self._grad_scale = 1.0
        self._grads: dict[int, Tensor] = {}

    @property
    def masters(self) -> Sequence[Tensor]:
        return self._entries.masters

    def state_tensors(self) -> Iterator[Tensor]:
        """What the optimizer holds of our states: the masters, and the moments under its own names."""
        for master in self.masters:
            yield master
            yield from (value for value in self._optimizer.state[master].values() if isinstance(value, Tensor))

    def set_grad_scale(self, total_norm: Tensor | None, loss_scale: float, max_norm: float) -> None:
        """Set the factor on the next step's gradients: that of DeepSpeed's ``unscale_and_clip_grads``, bit for bit.

        Args:
            total_norm: of the scaled gradients of all ranks; None where nothing is clipped.
            max_norm: 0 for no clipping.

        Reads ``total_norm`` once a step, whatever the number of subgroups.
        """
        if self._scaled_by is not None and self._scaled_by[0] is total_norm and self._scaled_by[1] == loss_scale:
            return
        self._scaled_by = (total_norm, loss_scale)
        scale: float | Tensor = loss_scale
        if max_norm > 0:
            assert total_norm is not None
            scale = torch.clamp(((total_norm / loss_scale) + 1e-6) / max_norm, min=1.0) * loss_scale
        self._grad_scale = float(1.0 / scale)

    def put_grad(self, index: int, grad: Tensor) -> None:
        """Keep a flat tensor's gradient for :meth:`step_put_grads`."""
        self._grads[index] = grad

    @property
    def has_grads(self) -> bool:
        """Whether all gradients were put since the last step."""
        return len(self._grads) == len(self._group_of)

    def step_put_grads(self, aliases: Sequence[Iterable[Alias]] = ()) -> None:
        """:meth:`step` with the gradients put since the last."""
        grads = [self._grads[i] for i in range(len(self._group_of))]
        self._grads.clear()
        self.step(grads, aliases)

    def step(self, grads: Sequence[Tensor], aliases: Sequence[Iterable[Alias]] = ()) -> None:
        """Update all flat parameters. See :meth:`FlatPartition.step`."""
        self.partition.runtime.check_usable()
        scalars = [
            scalars_at(
                self._optimizer.param_groups[group_index],
                step=self._entries.next_step(i),
                decoupled=self._decoupled,
                grad_scale=self._grad_scale,
            )
            for i, group_index in enumerate(self._group_of)
        ]
        self._scaled_by = None
        self.partition.step(grads, scalars, aliases)

    def gradient_arrived(self, subgroup: int) -> None:
        """See :meth:`offload.runtime.Runtime.gradient_arrived`."""
        self.partition.runtime.gradient_arrived(subgroup)

    def before_gradient(self, subgroup: int) -> None:
        """See :meth:`offload.runtime.Runtime.before_gradient`."""
        self.partition.runtime.before_gradient(subgroup)

    @property
    def in_flight(self) -> bool:
        """Whether an update was begun whose parameters are still pending."""
        return self.partition.runtime.in_flight

    def finish(self) -> None:
        """Return when the parameters may be read on the current stream, whatever they are read through."""
        self.partition.runtime.finish()

    def synchronize(self) -> None:
        """Wait until nothing is in flight."""
        self.partition.synchronize()

    def release_params(self) -> None:
        """See :meth:`FlatPartition.release_params`."""
        self.partition.release_params()

    def move_params(self, flats: Sequence[Tensor]) -> None:
        """See :meth:`FlatPartition.move_params`."""
        self.partition.move_params(flats)

    def adopt(self) -> None:
        """Take over the state that DeepSpeed has loaded into the optimizer."""
        self._entries.adopt()


class PendingStates:
    """Tensors that are views of the states of an update in flight: who reads or writes one first waits for all of it.

    Args:
        tensors: kept alive, since they are pending until they are read.
    """

    def __init__(self, offloaded: ShardUpdate, tensors: Sequence[Tensor]) -> None:
        self._offloaded = weakref.ref(offloaded)
        self._tensors = tensors
        weakref.finalize(self, _make_plain, tensors).atexit = False

    def await_where_read(self) -> None:
        """From now on, until the first of them is read."""
        wait = partial(_wait_then_make_plain, self._offloaded, self._tensors)
        for tensor in self._tensors:
            make_pending(tensor, wait)


def _wait_then_make_plain(reference: weakref.ref[ShardUpdate], tensors: Sequence[Tensor]) -> None:
    if (offloaded := reference()) is not None:
        offloaded.synchronize()
    _make_plain(tensors)


def _make_plain(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        make_plain(tensor)
