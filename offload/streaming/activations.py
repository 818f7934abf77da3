"""What calls of a model take on the device beside its weights, found by making them on tensors without memory."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from offload.streaming.arena import ALIGN_BYTES
from offload.streaming.experts import FusedExperts
from offload.streaming.newcomers import all_tensors
from offload.streaming.quantised import is_composite
from offload.streaming.routing import WorstRouting
from offload.tracing import LiveBytes, loss_of, make_fake

_MARGIN = 1.02  # for what libraries make around a call, and kernels inside an operation

Example = Mapping[str, Any] | Sequence[Any]


@dataclass(frozen=True, slots=True)
class Workload:
    """Calls of a model as they will be made.

    Attributes:
        example: arguments, by name or in order; of the largest call, if they differ in size.
        new_tokens: that ``generate()`` adds to those of ``example``; 0 for a call of the model itself.
        trains: a backward follows.
    """

    example: Example
    new_tokens: int = 0
    trains: bool = False

    def __post_init__(self) -> None:
        is_named = isinstance(self.example, Mapping)
        values = list(self.example.values() if isinstance(self.example, Mapping) else self.example)
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(values)):
            raise ValueError("example has no tensors: give the arguments of a call, as a dict or a tuple")
        if self.new_tokens < 0 or (self.new_tokens and not (is_named and "input_ids" in self.example)):
            raise ValueError(f"new_tokens={self.new_tokens} wants a number of tokens, and an example with input_ids")


@dataclass(frozen=True, slots=True)
class Taken:
    """Device memory that calls take beside weights.

    Attributes:
        peak_bytes: the most at a time, of arguments, activations, caches and gradients, with a small margin.
        last_bytes: when the call, or its backward, is done.
    """

    peak_bytes: int
    last_bytes: int


def activations(
    model: nn.Module,
    device: torch.device,
    workload: Workload,
    passing: Collection[Tensor],
    fused: Sequence[FusedExperts] = (),
) -> Taken:
    """What calls take, as the device's allocator counts; of a mixture, where all tokens go to the same experts.

    Args:
        passing: weights whose gradients leave the device as soon as backward has them.
        fused: experts that will be streamed one by one.

    Raises:
        ValueError: if the model cannot be called so, or on tensors without values; with the remedy.
    """
    if composite := [name for name, param in model.named_parameters() if is_composite(param)]:
        raise ValueError(
            f"{composite[0]} is quantised, and what its library takes to compute with it cannot be predicted; give "
            f"reserve=bytes instead of an example"
        )
    fake_of: dict[int, Tensor] = {}
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), WorstRouting():
            shadow = _shadow(model, device, fake_of)
            for experts in fused:
                module = shadow.get_submodule(experts.name)
                if "forward" not in module.__dict__:
                    module.forward = functools.partial(experts.loop, module)
            for tensor in passing:
                _drop_gradient(fake_of[id(tensor)])
            with LiveBytes(align_bytes=ALIGN_BYTES) as live:
                for tensor in all_tensors(shadow):
                    live.note(tensor)
                weight_bytes = live.live_bytes
                peak_bytes = max(_peaks(shadow, device, workload, live)) - weight_bytes
                return Taken(math.ceil(_MARGIN * peak_bytes), live.live_bytes - weight_bytes)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise ValueError(
            f"{type(model).__name__} cannot be called with this example on tensors without values, so what it takes "
            f"cannot be predicted; give reserve=bytes instead. It says: {error}"
        ) from error


def _shadow(model: nn.Module, device: torch.device, fake_of: dict[int, Tensor]) -> nn.Module:
    """The model over fake weights on ``device``; its own are not copied."""
    tensors = [*all_tensors(model)]
    shadow = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    fake_of.update((id(tensor), fake) for tensor, fake in make_fake(shadow, str(device)).items())
    return shadow


def _drop_gradient(weight: Tensor) -> None:
    def drop(param: Tensor) -> None:
        param.grad = None

    if weight.requires_grad:
        weight.register_post_accumulate_grad_hook(drop)  # type: ignore[no-untyped-call]


def _peaks(shadow: nn.Module, device: torch.device, workload: Workload, live: LiveBytes) -> list[int]:
    """The most bytes alive in each kind of call that is made."""
    args, kwargs = _arguments(workload.example, device)
    if workload.new_tokens:
        return [_prefill_peak(shadow, kwargs, live), _decode_peak(shadow, kwargs, workload.new_tokens, live)]
    with torch.set_grad_enabled(workload.trains):  # what is returned is kept until backward is done, as loops do
        output = shadow(*args, **kwargs)
        if workload.trains:
            torch.autograd.backward(loss_of(output, type(shadow).__name__))
    return [live.peak_bytes]


def _arguments(example: Example, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def fake(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        made = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=device)
        return made.requires_grad_(leaf.requires_grad)

    if isinstance(example, Mapping):
        return (), {name: tree_map(fake, value) for name, value in example.items()}
    return tuple(tree_map(fake, value) for value in example), {}


@torch.no_grad()
def _prefill_peak(shadow: nn.Module, kwargs: dict[str, Any], live: LiveBytes) -> int:
    """Of the first call that ``generate()`` makes, holding a mask of its own; of logits it keeps the last, in fp32."""
    ids = kwargs["input_ids"]
    mask = torch.empty(ids.shape[0], 1, ids.shape[-1], ids.shape[-1], dtype=torch.bool, device=ids.device)
    output = _call_with_cache(shadow, kwargs)
    del mask
    output.logits[:, -1].to(torch.float32, copy=True)
    return live.peak_bytes


@torch.no_grad()
def _decode_peak(shadow: nn.Module, kwargs: dict[str, Any], new_tokens: int, live: LiveBytes) -> int:
    """Of the last call that ``generate()`` makes: one token, with the cache of all before it."""
    ids = kwargs["input_ids"]
    longer = {
        name: value.new_empty(*value.shape[:-1], value.shape[-1] + new_tokens - 1)
        for name, value in kwargs.items()
        if isinstance(value, Tensor) and value.shape == ids.shape
    }
    output = _call_with_cache(shadow, longer)
    name = next(name for name in ("cache", "past_key_values") if getattr(output, name, None) is not None)
    cache = output[name]
    del output
    live.peak_bytes = live.live_bytes
    output = _call_with_cache(shadow, {**longer, "input_ids": longer["input_ids"][..., -1:], name: cache})
    output.logits[:, -1].to(torch.float32, copy=True)
    return live.peak_bytes


def _call_with_cache(shadow: nn.Module, kwargs: dict[str, Any]) -> Any:
    keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(shadow.forward).parameters else {}
    return shadow(**kwargs, **keep, use_cache=True)
