"""Matching a checkpoint to an optimizer and a model: everything is checked here, before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offload.checkpoint.contents import entry_key, name_params, unwrapped
from offload.checkpoint.folder import read_index
from offload.checkpoint.index import CheckpointError, Index, Param
from offload.kernels import State
from offload.kernels.codec import read_state
from offload.optimizer_state import NOT_LOADED
from offload.optimizers import SGD, Adagrad, Adam, AdamW, Lion
from offload.state_entries import entry_names
from offload.tensor_file import CHUNK_BYTES, StoredTensor, TensorFile

_OURS = {kind.__name__: kind for kind in (Adam, AdamW, Lion, Adagrad, SGD)}


class Stored:
    """A checkpoint whose index is sound and whose files are there, of the right size and with the right headers.

    Attributes:
        index: what it holds.
        optimizer, model: its tensors, by name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index, folder = read_index(path)
        self.optimizer: dict[str, StoredTensor] = {}
        self.model: dict[str, StoredTensor] = {}
        for name, record in self.index.files.items():
            try:
                file = TensorFile(folder, name, record)
            except ValueError as error:
                raise CheckpointError(str(error)) from error
            (self.optimizer if "-optimizer-" in name else self.model).update(file.tensors)

    def entry(self, name: str, param: Param) -> dict[str, StoredTensor]:
        """The stored state of a parameter."""
        keys = {entry: entry_key(name, entry) for entry in param.entries}
        if missing := [key for key in keys.values() if key not in self.optimizer]:
            raise CheckpointError(f"{self.path} lacks {missing[0]!r}, which its index names")
        return {entry: self.optimizer[key] for entry, key in keys.items()}


def match_params(index: Index, optimizer: torch.optim.Optimizer, model: nn.Module | None) -> dict[Tensor, str]:
    """The saved name of each of the optimizer's parameters. Raises CheckpointError if one is missing or another's."""
    names, named = name_params(optimizer, model)
    if named and index.named:
        missing = [name for name in names.values() if name not in index.params]
    elif len(names) == len(index.params):  # one of them has positions only
        names, missing = dict(zip(names, index.params, strict=True)), []
    else:
        raise CheckpointError(
            f"it has {len(index.params)} parameters, this optimizer {len(names)}, and no names to match them by: give "
            f"save and load the model"
        )
    if missing:
        raise CheckpointError(
            f"it lacks {len(missing)} of {len(names)} parameters, first {missing[0]!r}: it is another model's"
        )
    for param, name in names.items():
        if index.params[name].shape != tuple(param.shape):
            raise CheckpointError(
                f"parameter {name!r} has shape {index.params[name].shape} there and {tuple(param.shape)} here: it is "
                f"another model's"
            )
    return names


def state_dict_for(optimizer: torch.optim.Optimizer, stored: Stored, names: Mapping[Tensor, str]) -> dict[str, Any]:
    """The stored state as this optimizer's ``load_state_dict`` takes it, its tensors still in the files."""
    index, state, groups, number = stored.index, {}, [], 0
    for i, group in enumerate(optimizer.param_groups):
        numbers = range(number, number + len(group["params"]))
        number = numbers.stop
        saved = [index.params[names[param]] for param in group["params"]]
        for param_number, param, of_param in zip(numbers, group["params"], saved, strict=True):
            if of_param.entries:
                state[param_number] = stored.entry(names[param], of_param)
        groups.append(
            {**_hyper_parameters(i, group, [index.groups[each.group] for each in saved]), "params": [*numbers]}
        )
    return {"state": state, "param_groups": groups}


def _hyper_parameters(i: int, group: Mapping[str, Any], saved: list[dict[str, Any]]) -> dict[str, Any]:
    """What the group's parameters were saved with. Those of a group without any stay as they are."""
    if not saved:
        return {key: value for key, value in group.items() if key not in ("params", "param_names")}
    if any(other != saved[0] for other in saved):
        raise CheckpointError(
            f"the parameters of group {i} were saved in groups with different hyper-parameters: construct the "
            f"optimizer with the groups it was saved with"
        )
    return saved[0]


def check_for_torch(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Raise CheckpointError if an optimizer of torch's could not go on with this."""
    for group in state_dict["param_groups"]:
        if missing := optimizer.defaults.keys() - group.keys() - {*NOT_LOADED}:
            raise CheckpointError(f"its groups lack {sorted(missing)}, so no {type(optimizer).__name__} was saved")


def torch_state_dict(optimizer: torch.optim.Optimizer, stored: Stored, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """``state_dict`` with its tensors read, in torch's names and values. The model was loaded."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    state = {i: _torch_entry(stored.index, entry, params[i]) for i, entry in state_dict["state"].items()}
    groups = [
        {**loaded, **{key: group[key] for key in NOT_LOADED if key in group and key not in ("params", "param_names")}}
        for loaded, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=True)
    ]
    return {"state": state, "param_groups": groups}


def _torch_entry(index: Index, entry: Mapping[str, StoredTensor], param: Tensor) -> dict[str, Tensor]:
    if index.state_format == "fp32":
        return {name: value.read() for name, value in entry.items() if name != "master"}
    names = entry_names(index.state_format, _OURS[index.optimizer].rule.torch_names)
    fields = {field: entry[name].read().reshape(-1) for field, name in names.items() if name in entry}
    rows = read_state(State(index.state_format, **fields), param.detach().reshape(-1).cpu().bfloat16())
    torch_names = _OURS[index.optimizer].rule.torch_names
    moments = {torch_names[field]: getattr(rows, field).view_as(param) for field in torch_names if field in fields}
    return {"step": entry["step"].read(), **moments}


def match_model(stored: Stored, model: nn.Module) -> dict[str, StoredTensor]:
    """The stored tensor of each name in the model's state_dict. Raises CheckpointError if they differ in any."""
    if not stored.index.has_model:
        raise CheckpointError("it was saved without a model: load the model from where it is, and give none here")
    aliases = stored.index.aliases
    saved = {**stored.model, **{name: stored.model[to] for name, to in aliases.items() if to in stored.model}}
    own = unwrapped(model).state_dict()
    for what, names in (("lacks", own.keys() - saved.keys()), ("has also", saved.keys() - own.keys())):
        if names:
            raise CheckpointError(
                f"it {what} {len(names)} of the model's tensors, first {min(names)!r}: another model's"
            )
    for name, tensor in own.items():
        if tuple(tensor.shape) != saved[name].shape:
            raise CheckpointError(
                f"{name!r} has shape {saved[name].shape} there and {tuple(tensor.shape)} here: it is another model's"
            )
    return saved


def verify(tensors: Iterable[StoredTensor]) -> None:
    """Raise CheckpointError unless every byte is what was written."""
    buffer = torch.empty(CHUNK_BYTES, dtype=torch.uint8)
    try:
        for tensor in dict.fromkeys(tensors):
            tensor.verify(buffer)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def fill_model(model: nn.Module, tensors: Mapping[str, StoredTensor]) -> None:
    """Load a matched model, about a file at a time."""
    batch: dict[str, Tensor] = {}
    num_bytes = 0
    for name, stored in tensors.items():
        batch[name] = stored.read()
        num_bytes += stored.num_bytes
        if num_bytes >= CHUNK_BYTES:
            unwrapped(model).load_state_dict(batch, strict=False)
            batch, num_bytes = {}, 0
    unwrapped(model).load_state_dict(batch, strict=False)
