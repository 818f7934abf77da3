"""ZeRO stage 3 whose optimizer state lives in our runtime."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor

from . import seams
from .config import Settings
from .partition import Alias
from .update import ShardUpdate


class OffloadedStage3(DeepSpeedZeroOptimizer_Stage3):  # type: ignore[misc]  # DeepSpeed has no types
    """DeepSpeed's stage 3 as it is without offloading, but for masters, moments and the update, which are ours.

    Each of DeepSpeed's sub-groups is one flat parameter tensor and one subgroup of the plan; its gradients are one
    piece of DeepSpeed's flat gradient buffer.
    """

    settings: ClassVar[Settings]
    persistent_parameters: list[Tensor]  # DeepSpeed's

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        seams.check_attributes(self, seams.STAGE3_ATTRIBUTES)
        self._flats = list(self.fp16_partitioned_groups_flat)
        self._attach_gradients()

    def _attach_gradients(self) -> None:
        numels = [flat.numel() for flat in self._flats]
        for flat, grad in zip(self._flats, self.grad_partitions_flat_buffer.split(numels), strict=True):
            flat.grad = grad.data  # with a version counter of its own: that of a view counts writes to all sub-groups

    # ---- construction: DeepSpeed's constructor calls these two

    def _create_fp32_partitions(self) -> None:
        self.offloaded = ShardUpdate(
            self.optimizer,
            self.fp16_partitioned_groups_flat,
            [self.sub_group_to_group_id[i] for i in range(len(self.fp16_partitioned_groups_flat))],
            self.settings.options(),
        )
        self._aliases: dict[int, list[Alias]] = {}
        self.fp32_partitioned_groups_flat.extend(self.offloaded.masters)
        for group in self.optimizer.param_groups:
            group["params"] = []  # filled while DeepSpeed saves and loads

    def initialize_optimizer_states(self) -> None:
        """They are there since :meth:`_create_fp32_partitions`."""

    # ---- backward: gradients go down and states come up while it runs

    def partition_grads(self, params_to_release: list[Tensor], grad_partitions: list[Tensor]) -> Any:
        """DeepSpeed's, which writes reduced gradients, on its own stream."""
        sub_groups = [self._sub_group_of(param) for param in params_to_release]
        for sub_group in set(sub_groups):
            self._before_gradient(sub_group)
        buffers = super().partition_grads(params_to_release, grad_partitions)
        for sub_group in sub_groups:
            self.offloaded.gradient_arrived(sub_group)
        return buffers

    def _sub_group_of(self, param: Tensor) -> int:
        return int(self.grad_position[self.get_param_id(param)][0])

    def _before_gradient(self, sub_group: int) -> None:
        """A gradient may change: its copy, if it has begun, is done first, and then counts no more."""
        self.offloaded.before_gradient(sub_group)
        torch.autograd.graph.increment_version(self.fp16_partitioned_groups_flat[sub_group].grad)

    def _get_fp32_grad_state_partition(self, param: Tensor, *args: Any, **kwargs: Any) -> Any:
        """DeepSpeed's, through which gradients are read and set (``safe_set_full_grad``)."""
        self._before_gradient(self._sub_group_of(param))
        return super()._get_fp32_grad_state_partition(param, *args, **kwargs)

    def update_fp32_grad_for_param_vectorized(self, update_func: Any, param_list: list[Tensor]) -> None:
        """DeepSpeed's, which sets gradients by itself."""
        for sub_group in {self._sub_group_of(param) for param in param_list if param.requires_grad}:
            self._before_gradient(sub_group)
        super().update_fp32_grad_for_param_vectorized(update_func, param_list)

    # ---- the step, sub-group by sub-group

    def _prepare_sub_group(self, sub_group_id: int, timer_names: set[str]) -> None:
        self._take_gradients_from_elsewhere(sub_group_id)
        flat = self.fp16_partitioned_groups_flat[sub_group_id]
        partitions = [param.ds_tensor for param in self.fp16_groups[sub_group_id]]
        readers = [flat, *partitions, *self.averaged_gradients[sub_group_id]]
        self._aliases[sub_group_id] = [Alias(tensor, 0, flat.numel()) for tensor in readers]
        self.averaged_gradients[sub_group_id] = None  # it stays in the flat buffer

    def _take_gradients_from_elsewhere(self, sub_group_id: int) -> None:
        """Where a parameter was frozen on the way, DeepSpeed has zeros, and its last gradient is in the flat buffer."""
        flat_grad = self.fp16_partitioned_groups_flat[sub_group_id].grad
        for param, grad in zip(self.fp16_groups[sub_group_id], self.averaged_gradients[sub_group_id], strict=True):
            _, begin, numel = self.grad_position[self.get_param_id(param)]
            place = flat_grad.narrow(0, begin, numel)
            if place.data_ptr() != grad.data_ptr():
                self.offloaded.synchronize()
                self._before_gradient(sub_group_id)
                place.copy_(grad)

    def unscale_and_clip_grads(self, sub_group_id: int, total_norm: Tensor) -> None:
        self.offloaded.set_grad_scale(total_norm, self.loss_scale, self.clip_grad)

    def _optimizer_step(self, sub_group_id: int) -> None:
        """The last sub-group's turn is everyone's: the plan orders the updates.

        From here on whoever reads a partition of a parameter (its gathering in the next forward, for one) or writes a
        gradient waits for its sub-group.
        """
        if sub_group_id == len(self.fp16_partitioned_groups_flat) - 1:
            grads = [flat.grad for flat in self.fp16_partitioned_groups_flat]
            self.offloaded.step(grads, list(self._aliases.values()))
            self._aliases.clear()

    def _reassign_or_swap_out_partitioned_parameters(self, sub_group_id: int) -> None:
        """The update has written the parameters."""

    def _release_sub_group(self, sub_group_id: int, timer_names: set[str]) -> None:
        """Nothing was taken."""

    def _post_step(self, timer_names: set[str]) -> None:
        """DeepSpeed's, but parameters that it keeps gathered are left to the modules that read them next.

        They are in nearly every sub-group, so that gathering them here would wait for nearly all of the update.
        """
        persistent = self.persistent_parameters
        if self.offloaded.in_flight:
            self.persistent_parameters = []
        try:
            super()._post_step(timer_names)
        finally:
            self.persistent_parameters = persistent

    # ---- whoever reads or writes states waits for those in flight

    def _get_fp32_opt_state_partition(self, *args: Any, **kwargs: Any) -> Any:
        self.offloaded.synchronize()
        return super()._get_fp32_opt_state_partition(*args, **kwargs)

    def _restore_from_bit16_weights(self) -> None:
        self.offloaded.synchronize()
        super()._restore_from_bit16_weights()

    def state_dict(self) -> dict[str, Any]:
        self.offloaded.synchronize()
        state_dict: dict[str, Any] = super().state_dict()
        return state_dict

    @torch.no_grad()
    def load_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.offloaded.synchronize()
        super().load_state_dict(*args, **kwargs)
        self.offloaded.adopt()

    def offload_states(self, include: Any = None, *args: Any, **kwargs: Any) -> None:
        """DeepSpeed's, of parameters and gradients: masters and moments are where the plan has them."""
        self.offloaded.synchronize()
        include = seams.states_to_move(include)
        if OffloadStateTypeEnum.lp_params in include:
            self.offloaded.release_params()
        if OffloadStateTypeEnum.lp_grads in include:
            for flat in self._flats:
                flat.grad = None
        super().offload_states(include, *args, **kwargs)

    def reload_states(self, *args: Any, **kwargs: Any) -> None:
        """DeepSpeed's, which makes other flat tensors of the parameters: our own go on, over the memory of those."""
        self.offloaded.synchronize()
        super().reload_states(*args, **kwargs)
        self.offloaded.move_params(self.fp16_partitioned_groups_flat)
        self.fp16_partitioned_groups_flat[:] = self._flats
        self._attach_gradients()
