"""What a checkpoint keeps of an optimizer and a model: names, kinds and tensors, none of them copied."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from offload.checkpoint.index import Description, Index, Param
from offload.optimizer import OffloadedOptimizer
from offload.shards import is_sharded
from offload.tensor_file import NAMES, FileRecord, Kind, kind_of

_FILE_BYTES = 1 << 28  # a file is closed when it has as many: few files, and no more than one need be read again


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank saves: tensors by name, in the order of writing."""

    description: Description
    optimizer_tensors: dict[str, Tensor]
    model_tensors: dict[str, Tensor]


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module, below DistributedDataParallel and torch.compile, which put a prefix before its names."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            return model


def name_params(optimizer: torch.optim.Optimizer, model: nn.Module | None) -> tuple[dict[Tensor, str], bool]:
    """The optimizer's parameters by group, with their names, and whether these are the model's.

    From ``model``; else those that the optimizer was constructed with; else positions over all groups.

    Raises:
        ValueError: if a parameter is not the model's, or one is spread over ranks.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    of_model = [] if model is None else [*unwrapped(model).named_parameters()]
    for name, param in [*of_model, *((f"number {i}", param) for i, param in enumerate(params))]:
        if is_sharded(param):
            raise ValueError(
                f"parameter {name} is spread over ranks (a DTensor), and a checkpoint of this format keeps whole "
                f"parameters: use torch.distributed.checkpoint with get_state_dict and set_state_dict"
            )
    if model is not None:
        names: dict[Tensor, str] = {param: name for name, param in of_model}
        if strangers := [i for i, param in enumerate(params) if param not in names]:
            raise ValueError(
                f"{len(strangers)} of the optimizer's {len(params)} parameters are not the model's, first: number "
                f"{strangers[0]}; give the model that the optimizer was constructed with"
            )
        return {param: names[param] for param in params}, True
    if all("param_names" in group for group in optimizer.param_groups):
        given = [name for group in optimizer.param_groups for name in group["param_names"]]
        return dict(zip(params, given, strict=True)), True
    return {param: str(i) for i, param in enumerate(params)}, False


def part_of(optimizer: torch.optim.Optimizer, model: nn.Module | None, *, saves_model: bool) -> Part:
    """What this rank has to save, of a model only with ``saves_model``. Nothing is in flight.

    Raises:
        ValueError, TypeError: for what cannot be saved, naming it.
    """
    names, named = name_params(optimizer, model)
    params: dict[str, Param] = {}
    tensors: dict[str, Tensor] = {}
    for index, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            name = names[param]
            entry = dict(_tensors_of(name, optimizer.state.get(param, {})))
            params[name] = Param(index, *kind_of(param), tuple(entry))
            tensors.update((entry_key(name, key), tensor) for key, tensor in entry.items())
    of_model, aliases = ({}, {}) if model is None or not saves_model else model_tensors(model)
    for name, tensor in [*tensors.items(), *of_model.items(), *((names[param], param) for param in names)]:
        if tensor.dtype not in NAMES:
            raise TypeError(f"{name!r} has dtype {tensor.dtype}, which safetensors files have no name for")
    description = Description(
        optimizer=type(optimizer).__name__,
        state_format=optimizer.state_format if isinstance(optimizer, OffloadedOptimizer) else "fp32",
        named=named,
        groups=tuple(
            {key: value for key, value in group.items() if key not in ("params", "param_names")}
            for group in optimizer.param_groups
        ),
        params=params,
        has_model=model is not None,
        aliases=aliases,
    )
    return Part(description, tensors, of_model)


def without(part: Part, others: Iterable[Description]) -> Part:
    """``part`` without the parameters that others save already: those that several ranks hold alike.

    Raises:
        ValueError: if they do not hold them alike.
    """
    held = {name: param for other in others for name, param in other.params.items()}
    params = part.description.params
    for name in params.keys() & held.keys():
        if params[name].kind != held[name].kind:
            raise ValueError(
                f"parameter {name!r} is of {params[name].shape} here and of {held[name].shape} in another rank: a "
                f"checkpoint keeps whole parameters; use torch.distributed.checkpoint for parts of them"
            )
    own = {name: param for name, param in params.items() if name not in held}
    keys = {entry_key(name, entry) for name, param in own.items() for entry in param.entries}
    tensors = {key: tensor for key, tensor in part.optimizer_tensors.items() if key in keys}
    return replace(part, description=replace(part.description, params=own), optimizer_tensors=tensors)


def merged(
    descriptions: Sequence[Description], files: Mapping[str, FileRecord], data: str, extra: dict[str, Any]
) -> Index:
    """The index of what all ranks saved. Raises ValueError if their optimizers differ in kind."""
    first = descriptions[0]
    groups: list[dict[str, Any]] = []
    params: dict[str, Param] = {}
    for each in descriptions:
        if (each.optimizer, each.state_format, each.named) != (first.optimizer, first.state_format, first.named):
            raise ValueError(
                f"ranks save {first.optimizer} in {first.state_format} and {each.optimizer} in {each.state_format}: "
                f"they save one checkpoint together only with optimizers of one kind"
            )
        params.update({name: replace(p, group=p.group + len(groups)) for name, p in each.params.items()})
        groups += each.groups
    return Index(
        optimizer=first.optimizer,
        state_format=first.state_format,
        named=first.named,
        groups=tuple(groups),
        params=params,
        has_model=first.has_model,
        aliases=first.aliases,
        data=data,
        files=dict(files),
        extra=extra,
    )


def entry_key(param: str, entry: str) -> str:
    return f"{param}.{entry}"


def _tensors_of(name: str, entry: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for key, value in entry.items():
        if isinstance(value, Tensor):
            yield key, value
        elif isinstance(value, (bool, int, float)):
            yield key, torch.tensor(value)
        elif value is not None:  # torch's SGD notes that it has no momentum yet
            raise TypeError(f"{key!r} in the state of parameter {name} is a {type(value).__name__}, not a tensor")


def model_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of ``model.state_dict()``, each memory once, and the names of those that are another's.

    Raises:
        TypeError: for anything else in it.
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, value in unwrapped(model).state_dict().items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name!r} of the model's state_dict is a {type(value).__name__}, not a tensor")
        memory = (value.device, value.data_ptr(), value.stride(), *kind_of(value))
        if value.numel() and memory in first:
            aliases[name] = first[memory]
        else:
            first[memory] = name
            tensors[name] = value
    return tensors, aliases


def in_files(kinds: Iterable[tuple[str, Kind]]) -> Iterator[dict[str, Kind]]:
    """Cut tensors, in their order, into files of about ``_FILE_BYTES``."""
    file: dict[str, Kind] = {}
    num_bytes = 0
    for name, (dtype, shape) in kinds:
        file[name] = dtype, shape
        num_bytes += torch.Size(shape).numel() * dtype.itemsize
        if num_bytes >= _FILE_BYTES:
            yield file
            file, num_bytes = {}, 0
    if file:
        yield file
