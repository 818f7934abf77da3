"""Every part of DeepSpeed that the plugin touches, checked before it is used.

What is here is the same in DeepSpeed 0.16.9 to 0.19.8. Where a version moves one, the error names it, instead of a
training that goes wrong.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import hjson
from deepspeed.runtime.config_utils import dict_raise_error_on_duplicate_keys
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, OffloadStateTypeEnum

OLDEST = "0.16.9"
STAGE3 = "deepspeed.runtime.zero.stage3"
STAGE12 = "deepspeed.runtime.zero.stage_1_and_2"
ENGINE = "deepspeed.runtime.engine"


class SeamError(RuntimeError):
    """This DeepSpeed lacks something that the plugin needs."""


@dataclass(frozen=True, slots=True)
class Seam:
    """A method or function of DeepSpeed.

    Attributes:
        module, name: where it is; ``name`` may be "Class.method".
        parameters: their names in order, without self; more may follow. None for a class.
        use: what the plugin does with it.
        may_lack: whether older versions do without, and so without what the plugin does there.
    """

    module: str
    name: str
    parameters: tuple[str, ...] | None
    use: str
    may_lack: bool = False

    def check(self) -> None:
        """Raise :class:`SeamError` if it is not there, or takes other parameters."""
        try:
            found: Any = importlib.import_module(self.module)
            for part in self.name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            if self.may_lack:
                return
            raise SeamError(self._message("is not there")) from error
        if self.parameters is None:
            return
        parameters = [name for name in inspect.signature(_undecorated(found)).parameters if name != "self"]
        if tuple(parameters[: len(self.parameters)]) != self.parameters:
            raise SeamError(self._message(f"takes ({', '.join(parameters)}), not ({', '.join(self.parameters)})"))

    def _message(self, problem: str) -> str:
        return (
            f"DeepSpeed {deepspeed.__version__} does not fit: seam {self.module}.{self.name} ({self.use}) {problem}. "
            f"Use a version between {OLDEST} and the newest that docs/deepspeed.md names"
        )


def _undecorated(function: Any) -> Any:
    """The function below DeepSpeed's nvtx decorator, which takes ``*args, **kwargs`` and says not what it wraps."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    return _undecorated(cells["func"].cell_contents) if "func" in cells else function


_Z3, _Z12 = "DeepSpeedZeroOptimizer_Stage3", "DeepSpeedZeroOptimizer"
_OFFLOAD_STATES = ("include", "device", "pin_memory", "non_blocking")

STAGE3_SEAMS = (
    Seam(STAGE3, f"{_Z3}._create_fp32_partitions", (), "replaced: masters are rows of our states"),
    Seam(STAGE3, f"{_Z3}.initialize_optimizer_states", (), "replaced: our states are the optimizer's"),
    Seam(STAGE3, f"{_Z3}.partition_grads", ("params_to_release", "grad_partitions"), "extended: early copies"),
    Seam(STAGE3, f"{_Z3}._get_fp32_grad_state_partition", ("param",), "extended: a gradient may be set"),
    Seam(STAGE3, f"{_Z3}.update_fp32_grad_for_param_vectorized", ("update_func", "param_list"), "extended: likewise"),
    Seam(STAGE3, f"{_Z3}.get_param_id", ("param",), "called"),
    Seam(STAGE3, f"{_Z3}._prepare_sub_group", ("sub_group_id", "timer_names"), "replaced: no fp32 gradient"),
    Seam(STAGE3, f"{_Z3}.unscale_and_clip_grads", ("sub_group_id", "total_norm"), "replaced: a factor of the update"),
    Seam(STAGE3, f"{_Z3}._optimizer_step", ("sub_group_id",), "replaced: the update"),
    Seam(STAGE3, f"{_Z3}._reassign_or_swap_out_partitioned_parameters", ("sub_group_id",), "replaced: done by then"),
    Seam(STAGE3, f"{_Z3}._release_sub_group", ("sub_group_id", "timer_names"), "replaced: nothing to release"),
    Seam(STAGE3, f"{_Z3}._post_step", ("timer_names",), "extended: gathers no parameter whose update is in flight"),
    Seam(STAGE3, f"{_Z3}._get_fp32_opt_state_partition", ("param",), "extended: waits for the states"),
    Seam(STAGE3, f"{_Z3}._restore_from_bit16_weights", (), "extended: waits for the states"),
    Seam(STAGE3, f"{_Z3}.state_dict", (), "extended: waits for the states"),
    Seam(STAGE3, f"{_Z3}.load_state_dict", ("state_dict_list",), "extended: takes loaded states over"),
    Seam(STAGE3, f"{_Z3}.offload_states", _OFFLOAD_STATES, "extended: ours stay"),
    Seam(STAGE3, f"{_Z3}.reload_states", ("non_blocking",), "extended: parameters are elsewhere then"),
)
STAGE12_SEAMS = (
    Seam(STAGE12, f"{_Z12}.initialize_optimizer_states", (), "replaced: our states are the optimizer's"),
    Seam(STAGE12, f"{_Z12}.reduce_ready_partitions_and_remove_grads", ("param", "i"), "extended: backward has begun"),
    Seam(STAGE12, f"{_Z12}.step", ("closure",), "extended: shows DeepSpeed 16-bit partitions while it runs"),
    Seam(STAGE12, f"{_Z12}.scaled_global_norm", ("norm_type",), "extended: unused parameters"),
    Seam(STAGE12, f"{_Z12}.get_param_id", ("param",), "called"),
    Seam(STAGE12, f"{_Z12}.unscale_and_clip_grads", ("grad_groups_flat", "total_norm"), "replaced: a factor"),
    Seam(STAGE12, f"{_Z12}._optimizer_step", ("group_no",), "replaced: the update"),
    Seam(STAGE12, f"{_Z12}._link_all_hp_params", (), "called after a load"),
    Seam(STAGE12, f"{_Z12}._lazy_init_hp_params_optimizer_state", (), "called when states are there"),
    Seam(STAGE12, f"{_Z12}.load_state_dict", ("state_dict_list",), "extended: takes loaded states over"),
    Seam(STAGE12, f"{_Z12}.offload_states", _OFFLOAD_STATES, "extended: ours stay", may_lack=True),
    Seam(STAGE12, f"{_Z12}.reload_states", ("non_blocking",), "extended: parameters are elsewhere then", may_lack=True),
    Seam(ENGINE, _Z12, None, "the name by which the engine constructs stages 1 and 2"),
)
# Attributes of the optimizers, once constructed.
STAGE3_ATTRIBUTES = (
    "averaged_gradients", "clip_grad", "fp16_groups", "fp16_partitioned_groups_flat", "fp32_partitioned_groups_flat",
    "grad_partitions_flat_buffer", "grad_position", "loss_scale", "optimizer", "persistent_parameters",
    "sub_group_to_group_id",
)  # fmt: skip
STAGE12_ATTRIBUTES = (
    "bit16_groups", "bit16_groups_flat", "clip_grad", "device", "ignore_unused_parameters", "loss_scale", "optimizer",
    "parallel_partitioned_bit16_groups", "params_in_partition", "real_dp_process_group",
    "single_partition_of_fp32_groups", "_hp_optimizer_states_linked",
)  # fmt: skip


def check(seams: Sequence[Seam]) -> None:
    """Raise :class:`SeamError`, naming version and seam, for the first that does not fit."""
    for seam in seams:
        seam.check()


def check_attributes(zero_optimizer: object, names: Sequence[str]) -> None:
    """Raise :class:`SeamError` if a constructed ZeRO optimizer lacks an attribute."""
    for name in names:
        if not hasattr(zero_optimizer, name):
            raise SeamError(
                f"DeepSpeed {deepspeed.__version__} does not fit: seam attribute {name} of "
                f"{type(zero_optimizer).__mro__[1].__name__} is not there. Use a version between {OLDEST} and the "
                f"newest that docs/deepspeed.md names"
            )


def parse_json(text: str) -> object:
    """As DeepSpeed reads a configuration: it may have comments, and no key twice."""
    return hjson.loads(text, object_pairs_hook=dict_raise_error_on_duplicate_keys)


def offload_optimizer_keys() -> set[str]:
    """What this version's ``offload_optimizer`` block may have."""
    return set(DeepSpeedZeroOffloadOptimizerConfig.model_fields)


def states_to_move(include: Container[Any] | None) -> set[Any]:
    """What of ``offload_states(include)`` is DeepSpeed's to move: masters and moments are where the plan has them."""
    ours = (OffloadStateTypeEnum.hp_params, OffloadStateTypeEnum.optim_states)
    return {state for state in OffloadStateTypeEnum if state not in ours and (include is None or state in include)}


@contextlib.contextmanager
def zero_classes(stage3: type, stage12: type) -> Iterator[None]:
    """While active, engines construct these classes in the place of DeepSpeed's ZeRO optimizers."""
    with contextlib.suppress(ImportError):  # derives from stage 3's class: before that changes its name
        importlib.import_module("deepspeed.runtime.superoffload.superoffload_stage3")
    places = ((STAGE3, _Z3, stage3), (ENGINE, _Z12, stage12))
    modules = [importlib.import_module(module) for module, _, _ in places]
    stock = [getattr(module, name) for module, (_, name, _) in zip(modules, places, strict=True)]
    for module, (_, name, ours) in zip(modules, places, strict=True):
        setattr(module, name, ours)
    try:
        yield
    finally:
        for module, (_, name, _), theirs in zip(modules, places, stock, strict=True):
            setattr(module, name, theirs)
