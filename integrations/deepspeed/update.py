"""What both ZeRO optimizers share: the update of a rank's flat parameters with the groups of a torch optimizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from offload.options import Options

from .adam_groups import check_group, is_decoupled, scalars_at, state_entries
from .partition import FlatPartition


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

    def step_put_grads(self) -> None:
        """:meth:`step` with the gradients put since the last."""
        grads = [self._grads[i] for i in range(len(self._group_of))]
        self._grads.clear()
        self.step(grads)

    def step(self, grads: Sequence[Tensor]) -> None:
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
        self.partition.step(grads, scalars)

    def synchronize(self) -> None:
        """Wait until nothing is in flight."""
        self.partition.synchronize()

    def adopt(self) -> None:
        """Take over the state that DeepSpeed has loaded into the optimizer."""
        self._entries.adopt()
