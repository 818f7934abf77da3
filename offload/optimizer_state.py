"""Optimizer state in torch's schema: checked as a whole before anything is loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from offload.kernels.state import num_blocks
from offload.masters import MasterTable, ParamHome
from offload.shards import as_shard, local, spread_alike
from offload.state_entries import entry_names, saved_format, value_of

_Key = TypeVar("_Key")  # a parameter, or its index

# Group entries that say how torch's optimizer computes, not what: they stay as constructed.
NOT_LOADED = ("params", "foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay", "param_names")


def match_params(groups: Sequence[dict[str, Any]], saved_groups: Sequence[dict[str, Any]]) -> dict[int, Tensor]:
    """Parameters by the saved state's indices. Raises ValueError if the groups differ in number or size."""
    if len(groups) != len(saved_groups):
        raise ValueError(
            f"the state to load has {len(saved_groups)} parameter groups, this optimizer {len(groups)}: "
            f"it belongs to another model or to other groups"
        )
    params: dict[int, Tensor] = {}
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        if len(group["params"]) != len(saved["params"]):
            raise ValueError(
                f"group {index} of the state to load has {len(saved['params'])} parameters, this optimizer's "
                f"{len(group['params'])}: it belongs to another model or to other groups"
            )
        if bool(group.get("amsgrad")) != bool(saved.get("amsgrad")):
            raise ValueError(
                f"group {index} was saved with amsgrad={saved.get('amsgrad', False)} and constructed with "
                f"amsgrad={group.get('amsgrad', False)}; construct the optimizer as it was when it was saved"
            )
        params.update(zip(saved["params"], group["params"], strict=True))
    return params


def check_entry(index: int, home: ParamHome, saved: Mapping[str, Any], rule: str) -> None:
    """Raise ValueError unless ``saved`` holds a step and a state, in any format, of the parameter's shape."""
    shape = tuple(home.item.param.shape)
    source = saved_format(saved, home.moments, home.torch_names, home.state.format)
    if source is None or not ("step" in saved or rule == "SGD"):  # torch counts no steps of SGD
        names = {"step", *(home.torch_names[field] for field in home.moments)}
        missing = sorted(names - saved.keys()) or ["remainder"]
        raise ValueError(f"the state to load lacks {missing} for parameter {index}: it is no {rule} state")
    for field, name in entry_names(source, home.torch_names).items():
        if name not in saved:
            continue
        wanted = (num_blocks(home.item.numel),) if field.endswith("_scale") else shape
        if tuple(saved[name].shape) != wanted:
            raise ValueError(
                f"{name} of parameter {index} in the state to load has shape {tuple(saved[name].shape)}, the "
                f"parameter {shape}: the state belongs to another model"
            )
        if not spread_alike(saved[name], home.item.param):
            raise ValueError(
                f"{name} of parameter {index} in the state to load is not spread over ranks as the parameter is; "
                f"load it with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, which reshards"
            )


def fill_entry(home: ParamHome, saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """Copy a checked entry into a parameter's home. Returns the entry that ``optimizer.state`` is to hold."""
    home.load(saved)
    home.entry = {"step": torch.tensor(float(value_of(saved.get("step", 1.0)))), **home.views()}
    return home.entry


def adopt_entries(
    params: Iterable[Tensor],
    state: dict[Tensor, dict[str, Tensor]],
    masters: MasterTable,
    synchronize: Callable[[], None],
    rule: str,
) -> None:
    """Take over entries that somebody put in the place of ours, as torch's ZeroRedundancyOptimizer loads them.

    Raises:
        ValueError: if one is no state of its parameter.
    """
    for index, param in enumerate(params):
        home, entry = masters[param], state.get(param)
        if entry and entry is not home.entry:
            check_entry(index, home, entry, rule)
            synchronize()
            state[param] = fill_entry(home, entry)


def check_state(
    groups: Sequence[dict[str, Any]], masters: MasterTable, state_dict: Mapping[str, Any], rule: str = "Adam"
) -> dict[int, Tensor]:
    """Parameters by the state's indices. Raises ValueError, naming what is wrong, unless all of the state fits.

    Looks at names, shapes and dtypes only, so its tensors may still be in files.
    """
    if missing := sorted({"param_groups", "state"} - state_dict.keys()):
        raise ValueError(f"the state to load lacks {missing}: it is no optimizer's state_dict")
    params = match_params(groups, state_dict["param_groups"])
    saved_state: Mapping[int, Mapping[str, Any]] = state_dict["state"]
    for index, saved in saved_state.items():
        if index not in params:
            raise ValueError(f"the state to load has an entry for parameter {index}, which no group holds")
        param = params[index]
        if param not in masters:
            raise ValueError(
                f"the state to load has an entry for parameter {index}, which was frozen when this optimizer was "
                f"constructed; set requires_grad first"
            )
        check_entry(index, masters[param], saved, rule)
    return params


def load_state(
    groups: Sequence[dict[str, Any]],
    state: dict[Tensor, dict[str, Tensor]],
    masters: MasterTable,
    state_dict: Mapping[str, Any],
    params: Mapping[int, Tensor],
) -> None:
    """Fill ``state`` and the slabs behind ``masters`` from a state that :func:`check_state` gave ``params`` for.

    The state may be of another format. A float32 parameter is its own master, so a saved ``master`` is not needed for
    it; for any other dtype a missing ``master`` (state saved by torch, or before the first step) is taken from the
    parameter.
    """
    saved_state = state_dict["state"]
    for index, param in params.items():
        state.pop(param, None)
        if index in saved_state:  # a parameter without an entry starts again at its next step
            state[param] = fill_entry(masters[param], saved_state[index])
    for group, saved_group in zip(groups, state_dict["param_groups"], strict=True):
        loaded = {key: value for key, value in saved_group.items() if key not in NOT_LOADED}
        group.update(copy.deepcopy(loaded))  # a tensor lr is edited in place


def shared_entries(state: Mapping[_Key, Mapping[str, Tensor]]) -> dict[_Key, dict[str, Tensor]]:
    """The same memory as storages of their own, one a tensor.

    A slab is one storage, of which torch.save writes all for any tensor in it, and none if it is seen in two dtypes.
    """
    return {
        key: {name: as_shard(from_dlpack(to_dlpack(local(value))), value) for name, value in entries.items()}
        for key, entries in state.items()
    }


def copy_entries(state: Mapping[_Key, Mapping[str, Tensor]]) -> dict[_Key, dict[str, Tensor]]:
    """Copies that share no memory with the slabs."""
    return {key: {name: value.clone() for name, value in entries.items()} for key, entries in state.items()}
