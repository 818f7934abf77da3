"""ZeRO stages 1 and 2 whose optimizer state lives in our runtime."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import torch
from deepspeed import comm
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from . import seams
from .config import Settings
from .partition import Alias, default_subgroup_numel
from .update import PendingStates, ShardUpdate


class OffloadedStage12(DeepSpeedZeroOptimizer):  # type: ignore[misc]  # DeepSpeed has no types
    """DeepSpeed's stages 1 and 2 as they are without offloading, but for masters, moments and the update.

    Each parameter group's share of this rank is one flat parameter tensor, cut into subgroups of the plan.
    """

    settings: ClassVar[Settings]
    sub_group_size: ClassVar[int]
    # DeepSpeed's constructor puts fp32 masters on `device`: into host memory then, since a device that needs
    # offloading may have no room for them. From initialize_optimizer_states on it is the device.
    _master_device: Any = "cpu"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        seams.check_attributes(self, seams.STAGE12_ATTRIBUTES)
        self._lazy_init_hp_params_optimizer_state()
        self._states = PendingStates(self.offloaded, self._readers_of_states())
        self._used: set[int] = set()  # parameters with a gradient since the last step, by DeepSpeed's number
        self.accumulated_grads_in_cpu: dict[int, Tensor] = {}  # DeepSpeed's has it when it offloads: none are here

    @property
    def device(self) -> Any:
        return self._master_device

    @device.setter
    def device(self, device: Any) -> None:
        self._device_of_run = device

    # ---- construction: DeepSpeed's constructor calls this when partitions are made

    def initialize_optimizer_states(self) -> None:
        self._master_device = self._device_of_run
        flats = self._own_partitions()
        numel = sum(flat.numel() for flat in flats)
        self.offloaded = ShardUpdate(
            self.optimizer,
            flats,
            range(len(flats)),
            self.settings.options(),
            max_subgroup_numel=default_subgroup_numel(numel, self.sub_group_size),
        )
        self.single_partition_of_fp32_groups[:] = self.offloaded.masters
        for group, master in zip(self.optimizer.param_groups, self.offloaded.masters, strict=True):
            group["params"] = [master]

    def _own_partitions(self) -> list[Tensor]:
        """This rank's share of each parameter group, in the training dtype on the device."""
        return [
            partitions[comm.get_rank(group=process_group)]
            for partitions, process_group in zip(
                self.parallel_partitioned_bit16_groups, self.real_dp_process_group, strict=True
            )
        ]

    # ---- backward: states come up while it runs

    def reduce_ready_partitions_and_remove_grads(self, param: Tensor, i: int) -> None:
        """DeepSpeed's, once a parameter's gradient is there. This rank's flat gradients are made in the step only."""
        super().reduce_ready_partitions_and_remove_grads(param, i)
        self.offloaded.gradient_arrived(0)
        self._used.add(self.get_param_id(param))

    # ---- the step

    def scaled_global_norm(self, *args: Any, **kwargs: Any) -> Any:
        """DeepSpeed's, which looks for parameters without gradients only where it offloads itself."""
        owned = itertools.chain.from_iterable(self.params_in_partition)
        if not self.ignore_unused_parameters and any(self.get_param_id(param) not in self._used for param in owned):
            raise AssertionError(
                "ignore_unused_parameters=false, and parameters had no gradient in this step: let the loss depend on "
                "all that are trained, or set zero_optimization.ignore_unused_parameters to true"
            )
        return super().scaled_global_norm(*args, **kwargs)

    def step(self, closure: Any = None) -> None:
        """DeepSpeed's, with partitions of the training dtype where it expects fp32 ones.

        So it casts no gradient, and its copies of new parameters are of a tensor to itself.
        """
        self.single_partition_of_fp32_groups = self._own_partitions()
        try:
            super().step(closure)
        finally:
            for flat in self.single_partition_of_fp32_groups:
                flat.grad = None
            self.single_partition_of_fp32_groups = list(self.offloaded.masters)
            self._used.clear()
        if self.offloaded.has_grads:
            self.offloaded.step_put_grads(self._readers_of_partitions())
            self._states.await_where_read()

    def unscale_and_clip_grads(self, grad_groups_flat: list[Tensor], total_norm: Tensor | None) -> None:
        self.offloaded.set_grad_scale(total_norm, self.loss_scale, self.clip_grad)

    def _optimizer_step(self, group_no: int) -> None:
        """The last group's turn is everyone's: the plan orders the updates.

        With several ranks it comes before DeepSpeed gathers the new parameters, which is a part of its step. A rank by
        itself has nothing to gather: the update begins behind the step, and hides under the next forward.
        """
        flat = self.single_partition_of_fp32_groups[group_no]
        assert flat.grad is not None
        self.offloaded.put_grad(group_no, flat.grad)
        if group_no == len(self.bit16_groups) - 1 and self._gathers:
            self.offloaded.step_put_grads()
            self.offloaded.finish()
            self._states.await_where_read()

    @property
    def _gathers(self) -> bool:
        """Whether other ranks wait for what this one updates."""
        return any(comm.get_world_size(group=group) > 1 for group in self.real_dp_process_group)

    def _readers_of_partitions(self) -> list[list[Alias]]:
        """What a lone rank's parameters are read and written through: themselves, and DeepSpeed's flat tensors."""
        found = []
        for params, whole, own in zip(self.bit16_groups, self.bit16_groups_flat, self._own_partitions(), strict=True):
            aliases = [Alias(flat, 0, own.numel()) for flat in (whole, own)]
            for param in params:  # by their addresses: DeepSpeed orders and pads them as it likes
                begin = (param.data_ptr() - own.data_ptr()) // own.element_size()
                aliases.append(Alias(param, begin, begin + param.numel()))
            found.append(aliases)
        return found

    # ---- states in flight, and loading

    def _readers_of_states(self) -> list[Tensor]:
        """What our states are read through: masters, moments, and the fragments of them that parameters refer to."""
        found = list(self.offloaded.state_tensors())
        for param in itertools.chain.from_iterable(self.bit16_groups):
            if (fragments := param._hp_mapping) is not None:
                found += [fragments.hp_fragment, *fragments.optim_fragment.values()]
        return found

    @torch.no_grad()
    def load_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.offloaded.synchronize()
        super().load_state_dict(*args, **kwargs)
        self.offloaded.adopt()
        self._link_states()

    def _link_states(self) -> None:
        """Have parameters refer to our states anew."""
        self._link_all_hp_params()
        self._hp_optimizer_states_linked = False
        self._lazy_init_hp_params_optimizer_state()
        self._states = PendingStates(self.offloaded, self._readers_of_states())

    def offload_states(self, include: Any = None, *args: Any, **kwargs: Any) -> None:
        """DeepSpeed's, of parameters and gradients: masters and moments are where the plan has them."""
        self.offloaded.synchronize()
        include = seams.states_to_move(include)
        if OffloadStateTypeEnum.lp_params in include:
            self.offloaded.release_params()
        super().offload_states(include, *args, **kwargs)

    def reload_states(self, *args: Any, **kwargs: Any) -> None:
        """DeepSpeed's, which has the parameters elsewhere."""
        self.offloaded.synchronize()
        super().reload_states(*args, **kwargs)
        self.offloaded.move_params(self._own_partitions())
        self._link_states()
