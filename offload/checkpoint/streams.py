"""The tensors of a checkpoint in the order of writing: from where they lie, or from copies while training goes on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from offload.checkpoint.contents import Part, entry_key, unwrapped
from offload.optimizer import OffloadedOptimizer
from offload.snapshot import Copier
from offload.state_entries import entry_names, entry_views

Stream = Iterator[tuple[str, str, Tensor]]  # "optimizer" or "model", the tensor's name, the tensor


def at_rest(part: Part) -> Stream:
    """Everything as it lies. Nothing may change it meanwhile."""
    yield from (("optimizer", key, tensor) for key, tensor in part.optimizer_tensors.items())
    yield from (("model", key, tensor) for key, tensor in part.model_tensors.items())


@dataclass(frozen=True, slots=True)
class _Moving:
    """A parameter that comes in the copy of its subgroup.

    Attributes:
        entries: names of its state's tensors in the checkpoint, and those of them that are in no slab: step counts.
        model_key: its name among the model's tensors, if the model is saved.
    """

    name: str
    offset: int
    numel: int
    shape: tuple[int, ...]
    entries: dict[str, Tensor | None]
    model_key: str | None


@dataclass(frozen=True, slots=True)
class _Still:
    """A tensor that no step changes. It is read when it is its turn, if it was not copied at once."""

    kind: str
    key: str
    tensor: Tensor
    version: int

    def read(self) -> tuple[str, str, Tensor]:
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"{self.key!r} was changed before a snapshot had written it, and no step changes it: wait for the "
                f"snapshot's result() first"
            )
        return self.kind, self.key, self.tensor


def in_motion(
    optimizer: OffloadedOptimizer, part: Part, model: nn.Module | None, names: dict[Tensor, str], copier: Copier
) -> tuple[Part, Stream]:
    """``part`` in the order of writing, and its tensors as they are now, from copies that ``copier`` makes from now on.

    What a forward pass changes, the model's buffers, is copied at once; frozen parameters are read when it is their
    turn, and the stream raises RuntimeError if they were changed by then.
    """
    moving = {index: [*_moving_of(optimizer, index, part, names)] for index in copier.events}
    order = [each for of_subgroup in moving.values() for each in of_subgroup]
    entries = {entry_key(each.name, entry): None for each in order for entry in each.entries}
    weights = {each.model_key: None for each in order if each.model_key is not None}
    optimizer_tensors = {
        key: part.optimizer_tensors[key] for key in [*entries, *(part.optimizer_tensors.keys() - entries)]
    }
    model_tensors = {key: part.model_tensors[key] for key in [*weights, *(part.model_tensors.keys() - weights)]}
    frozen = {} if model is None else dict(unwrapped(model).named_parameters(remove_duplicate=False))
    still = [_still("optimizer", key, t, is_frozen=False) for key, t in optimizer_tensors.items() if key not in entries]
    still += [
        _still("model", key, t, is_frozen=key in frozen) for key, t in model_tensors.items() if key not in weights
    ]
    ordered = replace(part, optimizer_tensors=optimizer_tensors, model_tensors=model_tensors)
    return ordered, _stream(optimizer, moving, still, copier)


def _moving_of(optimizer: OffloadedOptimizer, index: int, part: Part, names: dict[Tensor, str]) -> Iterator[_Moving]:
    actions = optimizer.runtime.actions[index]
    in_slab = {*entry_names(optimizer.state_format, optimizer.rule.torch_names).values()}
    for item in actions.slices:
        name = names[item.param]
        param = part.description.params.get(name)
        if param is None:  # another rank saves it
            continue
        entries = {
            entry: None if entry in in_slab else part.optimizer_tensors[entry_key(name, entry)].detach().clone()
            for entry in param.entries
        }
        key = part.description.aliases.get(name, name)
        shape = tuple(item.param.shape)
        yield _Moving(name, item.offset, item.numel, shape, entries, key if key in part.model_tensors else None)


def _still(kind: str, key: str, tensor: Tensor, *, is_frozen: bool) -> _Still:
    alias = tensor.detach() if is_frozen else tensor.detach().to("cpu", copy=True)
    return _Still(kind, key, alias, alias._version)


def _stream(
    optimizer: OffloadedOptimizer, moving: dict[int, list[_Moving]], still: list[_Still], copier: Copier
) -> Stream:
    layouts = {index: optimizer.runtime.actions[index] for index in moving}
    torch_names = optimizer.rule.torch_names
    del optimizer
    for copy in copier:
        actions = layouts[copy.subgroup]
        state = actions.layout.state(copy.state)
        weights = {item.offset: param for item, param in zip(actions.slices, copy.params, strict=True)}
        for each in moving[copy.subgroup]:
            views = entry_views(state.narrow(each.offset, each.numel), each.shape, actions.dtype, torch_names)
            for entry, tensor in each.entries.items():
                yield "optimizer", entry_key(each.name, entry), views[entry] if tensor is None else tensor
            if each.model_key is not None:
                yield "model", each.model_key, weights[each.offset].view(each.shape)
    yield from (each.read() for each in still)
