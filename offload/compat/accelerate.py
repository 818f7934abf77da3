"""accelerate's ``cpu_offload``, ``disk_offload`` and ``dispatch_model``, streamed: change the import, keep the call.

As there, the model comes back, takes inputs from any device and gives outputs on the device of the inputs. Other than
there, weights keep their values on the CPU between calls instead of going to the meta device, weights shared by several
modules and buffers stay on the device, and training works.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from offload.accelerators import accelerator_for
from offload.streaming import StreamHandle, stream
from offload.streaming.blocks import find_blocks

logger = logging.getLogger("offload")

_OFFLOADED = ("cpu", "disk")
# On the model, which the handle refers to: a table of handles would keep every model alive.
_HANDLE, _INPUT_HOOKS = "_offload_handle", "_offload_input_hooks"


def cpu_offload(
    model: nn.Module,
    execution_device: torch.device | str | None = None,
    offload_buffers: bool = False,
    state_dict: dict[str, Tensor] | None = None,
    preload_module_classes: Sequence[str] | None = None,
) -> nn.Module:
    """Stream all of ``model`` from host memory. Arguments as accelerate's; see :func:`dispatch_model` for limits."""
    _refuse(state_dict=state_dict)
    _say_buffers_stay(offload_buffers)
    return _attach(model, execution_device, {"": "cpu"}, None, preload_module_classes, None)


def disk_offload(
    model: nn.Module,
    offload_dir: str | PathLike[str],
    execution_device: torch.device | str | None = None,
    offload_buffers: bool = False,
    preload_module_classes: Sequence[str] | None = None,
) -> nn.Module:
    """Stream all of ``model`` from files in ``offload_dir``. Arguments as accelerate's."""
    _say_buffers_stay(offload_buffers)
    return _attach(model, execution_device, {"": "disk"}, offload_dir, preload_module_classes, None)


def dispatch_model(
    model: nn.Module,
    device_map: Mapping[str, str | int | torch.device],
    main_device: str | int | torch.device | None = None,
    state_dict: dict[str, Tensor] | None = None,
    offload_dir: str | PathLike[str] | None = None,
    offload_index: dict[str, str] | None = None,
    offload_buffers: bool = False,
    skip_keys: str | Sequence[str] | None = None,
    preload_module_classes: Sequence[str] | None = None,
    force_hooks: bool = False,
) -> nn.Module:
    """Keep on the device what ``device_map`` puts there, and stream what it puts on "cpu" or on "disk".

    Raises:
        ValueError: for more than one accelerator, and arguments that streaming cannot honour.
    """
    _refuse(state_dict=state_dict, offload_index=offload_index)
    _say_buffers_stay(offload_buffers)
    where = {name: str(device) for name, device in device_map.items()}
    on_device = sorted({device for device in where.values() if device not in _OFFLOADED})
    if len(on_device) > 1:
        raise ValueError(f"device_map uses {on_device}; streaming runs on one accelerator")
    device = main_device if main_device is not None else on_device[0] if on_device else None
    if isinstance(device, int) or (isinstance(device, str) and device.isdigit()):
        device = torch.device(f"{_current()}:{device}")
    if not set(where.values()) & set(_OFFLOADED) and not force_hooks:
        return model.to(device)
    skipped = (skip_keys,) if isinstance(skip_keys, str) else skip_keys
    _attach(model, device, where, offload_dir, preload_module_classes, skipped)
    model.hf_device_map = dict(device_map)  # type: ignore[assignment]
    return model


def remove(model: nn.Module) -> None:
    """Undo any of the above: the model is on the CPU again.

    Raises:
        ValueError: if none of them was called on it.
    """
    handle: StreamHandle | None = model.__dict__.pop(_HANDLE, None)
    if handle is None:
        raise ValueError("this model was not offloaded by offload.compat.accelerate")
    for hook in model.__dict__.pop(_INPUT_HOOKS):
        hook.remove()
    handle.remove()


def remove_hook_from_submodules(module: nn.Module) -> None:
    """accelerate's name for :func:`remove`; as there, a model that was not offloaded is left as it is."""
    if _HANDLE in module.__dict__:
        remove(module)


def _current() -> str:
    found = torch.accelerator.current_accelerator()
    return "cpu" if found is None else found.type


def _refuse(**arguments: object) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(
                f"{name} is not available: weights are those of the model; load them first, or use "
                f"offload.stream_from_pretrained"
            )


def _say_buffers_stay(offload_buffers: bool) -> None:
    """A call with them offloaded gives the same, so it is no error; only the memory is not saved."""
    if offload_buffers:
        logger.warning(
            "offload_buffers=True has no effect: buffers stay on the device, so that what modules write to them is kept"
        )


def _attach(
    model: nn.Module,
    device: torch.device | str | None,
    where: Mapping[str, str],
    offload_dir: str | PathLike[str] | None,
    preload_module_classes: Sequence[str] | None,
    skip_keys: Sequence[str] | None,
) -> nn.Module:
    if "disk" in where.values() and offload_dir is None:
        raise ValueError('device_map puts modules on "disk"; say where with offload_dir')
    device = torch.device(device) if device is not None else torch.device(_current())
    units = _units(model, preload_module_classes or ())
    handle = stream(
        model,
        accelerator_for(device).memory().free_bytes,
        device=device,
        blocks=units,
        resident=[name for name in units if _place_of(name, where) not in _OFFLOADED],
        experts=None,
        reserve=0,
        disk=offload_dir if "disk" in where.values() else None,
        disk_blocks=[name for name in units if _place_of(name, where) == "disk"] if "disk" in where.values() else None,
        verbose=False,
    )
    model.__dict__[_HANDLE] = handle
    model.__dict__[_INPUT_HOOKS] = _InputHooks(device, skip_keys or ()).register(model)
    return model


def _units(model: nn.Module, preload_module_classes: Sequence[str]) -> list[str]:
    """What is streamed as one: repeated blocks, the classes that are to be loaded whole, and leaves beside those."""
    try:
        blocks = [name for name, _ in find_blocks(model)]
    except ValueError:
        blocks = []
    blocks += [name for name, module in model.named_modules() if type(module).__name__ in preload_module_classes]
    outermost = [name for name in blocks if not any(name != other and name.startswith(f"{other}.") for other in blocks)]
    leaves = [
        name
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False)) and not any(_is_in(name, unit) for unit in outermost)
    ]
    innermost = [name for name in leaves if not any(name != other and _is_in(other, name) for other in leaves)]
    return outermost + innermost


def _is_in(name: str, unit: str) -> bool:
    return name == unit or name.startswith(f"{unit}.") or unit == ""


def _place_of(name: str, where: Mapping[str, str]) -> str:
    """The entry of the map that is closest to the module."""
    owners = [owner for owner in where if _is_in(name, owner)]
    if not owners:
        raise ValueError(f"device_map says nothing about {name!r}")
    return where[max(owners, key=len)]


class _InputHooks:
    """Inputs go to the device, outputs to where the inputs came from."""

    def __init__(self, device: torch.device, skip_keys: Sequence[str]) -> None:
        self._device = device
        self._skip_keys = frozenset(skip_keys)
        self._origin = device

    def register(self, model: nn.Module) -> list[Any]:
        return [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
        ]

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self._origin = tensors[0].device if tensors else self._device
        moved = {k: v if k in self._skip_keys else self._to(v, self._device) for k, v in kwargs.items()}
        return self._to(args, self._device), moved

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        return output if self._origin == self._device else self._to(output, self._origin)

    @staticmethod
    def _to(value: Any, device: torch.device) -> Any:
        return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, value)
