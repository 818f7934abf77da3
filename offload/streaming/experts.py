"""Mixtures of experts: which modules are experts, and how one of many in a single parameter is shown to the model.

There are two kinds. *Separate* experts are modules in a list called "experts"; each is called if a token is routed to
it, and streams as a block does. *Fused* experts lie in a few parameters whose first dimension counts them, as
transformers keeps them; their module indexes those parameters by the expert.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from offload.streaming.blocks import Block, NamedTensor, collect_weights
from offload.streaming.expert_cache import ExpertCache
from offload.streaming.host_memory import HostMemory
from offload.streaming.packing import PackedLayer, Packing
from offload.streaming.piecewise import PiecewiseParameter, pieces_of
from offload.streaming.streamer import Streamer
from offload.streaming.visits import Visits
from offload.streaming.wrapping import ReplacedForward, untraced

_LIST_NAME = "experts"
_FUSED_ARGUMENTS = ["self", "hidden_states", "top_k_index", "top_k_weights"]


@dataclass(frozen=True, slots=True)
class FusedExperts:
    """A module that keeps all of its experts in a few parameters.

    Attributes:
        names: of those parameters within the module. params: in the same order, each (experts, ...).
    """

    name: str
    module: nn.Module
    names: tuple[str, ...]
    params: tuple[nn.Parameter, ...]

    @property
    def num_experts(self) -> int:
        return len(self.params[0])

    @property
    def loop(self) -> Callable[..., Any]:
        """The loop over experts that its class has, a function of the module and its arguments."""
        loop: Callable[..., Any] = inspect.unwrap(type(self.module).forward)
        return loop

    def weights_of(self, expert: int) -> list[NamedTensor]:
        """Its part of every parameter, as views."""
        return [
            NamedTensor(f"{self.name}.{name}[{expert}]", param.detach()[expert])
            for name, param in zip(self.names, self.params, strict=True)
        ]

    @property
    def packing(self) -> Packing:
        """Of one expert; all are alike."""
        return Packing(self.weights_of(0))


@dataclass(frozen=True, slots=True)
class Experts:
    """What a model has of either kind, in the order of the model."""

    separate: tuple[Block, ...] = ()
    fused: tuple[FusedExperts, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.separate or self.fused)

    def tensors(self) -> Iterator[Tensor]:
        yield from (weight.tensor for block in self.separate for weight in block.weights)
        yield from (param for fused in self.fused for param in fused.params)

    def as_blocks(self) -> list[Block]:
        """With all weights of a fused module as one block."""
        whole = [
            Block(
                f.name, f.module, tuple(NamedTensor(f"{f.name}.{n}", p) for n, p in zip(f.names, f.params, strict=True))
            )
            for f in self.fused
        ]
        return [*self.separate, *whole]

    @property
    def least_cache_bytes(self) -> int:
        """Two of the largest, so that one is loaded while another is used."""
        return 2 * max(self.expert_bytes(), default=0)

    def expert_bytes(self) -> list[int]:
        """Of every expert's copy on the device, the separate ones first."""
        separate = [Packing(block.weights).num_bytes for block in self.separate]
        return separate + [fused.packing.num_bytes for fused in self.fused for _ in range(fused.num_experts)]


def find_experts(model: nn.Module, blocks: Sequence[tuple[str, nn.Module]]) -> Experts:
    """The experts inside ``blocks``. Fused ones that are trained are none: they stream with their block."""
    uses = Counter(id(param) for _, param in model.named_parameters(remove_duplicate=False))
    separate, fused = [], []
    for block_name, block in blocks:
        for inner_name, module in block.named_modules(prefix=block_name):
            if module is block:
                continue
            if inner_name.rpartition(".")[2] == _LIST_NAME and isinstance(module, nn.ModuleList) and len(module) > 1:
                separate += [(f"{inner_name}.{name}", child) for name, child in module.named_children()]
            elif names := fused_names(module):
                params = tuple(module.get_parameter(name) for name in names)
                if not any(param.requires_grad or uses[id(param)] > 1 for param in params):
                    fused.append(FusedExperts(inner_name, module, names, params))
    return Experts(tuple(collect_weights(model, separate)), tuple(fused))


def fused_names(module: nn.Module) -> tuple[str, ...]:
    """The parameters that hold one part for each expert; none if ``module`` is not of transformers' kind."""
    num_experts = getattr(module, "num_experts", None)
    loop = inspect.unwrap(type(module).forward)
    if not isinstance(num_experts, int) or [*inspect.signature(loop).parameters] != _FUSED_ARGUMENTS:
        return ()
    return tuple(n for n, p in module.named_parameters(recurse=False) if p.ndim >= 2 and len(p) == num_experts > 1)


class ExpertSlice(PackedLayer):
    """One expert of a fused module, as a layer. At rest it is a part of the module's parameters."""

    def __init__(self, fused: FusedExperts, expert: int, packing: Packing, *, is_pinned: bool) -> None:
        params = [NamedTensor(name, param) for name, param in zip(fused.names, fused.params, strict=True)]
        super().__init__(params, packing, [], None, is_pinned)
        self._parts = [pieces_of(param, expert) for param in fused.params]

    def pinned(self) -> list[tuple[int, Tensor]] | None:
        if not self._is_pinned:
            return None
        pieces = [piece.view(torch.uint8).flatten() for (piece,) in self._parts]
        return [(place.offset_bytes, piece) for place, piece in zip(self.packing.places, pieces, strict=True)]

    def read_into(self, stage: Tensor) -> None:
        for view, pieces in zip(self.packing.views(stage), self._parts, strict=True):
            torch.cat([*pieces], out=view)

    def show_device(self, arena: Tensor, offset: int) -> None:
        self._versions = [view._version for view in self._views_at(arena, offset)]

    def show_host(self) -> int | None:
        assert self._visiting is not None
        changed = [i for i, view in enumerate(self._visiting[1]) if view._version != self._versions[i]]
        return changed[0] if changed else None

    def visiting(self, index: int) -> Tensor:
        """The expert's part of the parameter ``index``, on the device."""
        assert self._visiting is not None
        return self._visiting[1][index]

    def num_holders(self) -> int:
        """References to the parts on the device, those that are always there included."""
        assert self._visiting is not None
        return sum(sys.getrefcount(view) for view in self._visiting[1])


def expert_layers(experts: Experts, host: HostMemory, mapped: Container[str]) -> list[PackedLayer]:
    """Every expert as a layer, in the order of :meth:`Experts.expert_bytes`; moved to memory of ``host``, or left in
    the mapped files that those named in ``mapped`` are in."""
    layers: list[PackedLayer] = []
    for block in experts.separate:
        packing = Packing(block.weights)
        if block.name in mapped:
            layers.append(PackedLayer.mapped(block.weights, packing))
        else:
            layers.append(PackedLayer.in_memory(block.weights, packing, *host.slab(packing.num_bytes)))
    for fused in experts.fused:
        pinned = [] if fused.name in mapped else [_move_to(host, param) for param in fused.params]
        is_pinned, packing = bool(pinned) and all(pinned), fused.packing
        layers += [ExpertSlice(fused, i, packing, is_pinned=is_pinned) for i in range(fused.num_experts)]
    return layers


def _move_to(host: HostMemory, param: nn.Parameter) -> bool:
    """Whether what ``param`` lies in now is pinned."""
    slab, is_pinned = host.slab(param.nbytes)
    view = slab[: param.nbytes].view(param.dtype).view(param.shape)
    view.copy_(param.data)
    param.data = view
    return is_pinned


class FusedForward:
    """A fused module's forward, with one expert at a time on the device, until :meth:`remove`.

    What runs is the loop over experts that the class has, in its order, whatever faster implementation was chosen for
    it: those want all experts at once. While it runs, its parameters are stood in for by :class:`_StandIn`.

    Args:
        first: the layer that the module's expert 0 is.
    """

    def __init__(self, fused: FusedExperts, first: int, streamer: Streamer, cache: ExpertCache) -> None:
        self._module = fused.module
        self._fused = fused
        self._first = first
        self._streamer: Streamer | None = streamer
        self._cache = cache
        original = fused.module.forward

        def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Any:
            if self._streamer is None or self._is_replaced():
                return original(hidden_states, top_k_index, top_k_weights)
            return self._run(self._streamer, hidden_states, top_k_index, top_k_weights)

        self._replaced = ReplacedForward(fused.module, untraced(forward))
        loop = functools.partial(fused.loop, fused.module)
        self._loop: Callable[..., Any] = original if self._replaced.had_own else loop
        fill_state = functools.partial(self._fill_state)  # hooks take attributes, which methods do not
        self._state_hook = fused.module.register_state_dict_post_hook(fill_state)  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        """Forward is as before. If another wrapper was put around this one since, this one stays and does nothing."""
        self._streamer = None
        self._replaced.remove()
        self._state_hook.remove()
        for name, param in self._piecewise():
            self._module._parameters[name] = nn.Parameter(param.assembled(), requires_grad=False)

    def _piecewise(self) -> list[tuple[str, PiecewiseParameter]]:
        params = ((name, self._module._parameters.get(name)) for name in self._fused.names)
        return [(name, param) for name, param in params if isinstance(param, PiecewiseParameter)]

    def _fill_state(self, module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
        """What a state_dict() holds are values."""
        state.update((prefix + name, param.assembled()) for name, param in self._piecewise())

    def _is_replaced(self) -> bool:
        """Other parameters were registered since: those stay on the device, and nothing stands in for them."""
        own = zip(self._fused.names, self._fused.params, strict=True)
        return any(self._module._parameters.get(name) is not param for name, param in own)

    def _run(self, streamer: Streamer, *args: Tensor) -> Any:
        if any(param.requires_grad for param in self._fused.params):
            raise RuntimeError(
                f"experts of {self._fused.name!r} were frozen when the model was streamed and are trained now; call "
                f"remove() and stream again, and they stream with their block"
            )
        for name, param in self._piecewise():
            if param.was_written():
                raise RuntimeError(
                    f"{self._fused.name}.{name} was written to, and its values stay those of the checkpoint's files, "
                    f"where each expert is apart: save the model as it should be, and stream that"
                )
        routed = sorted({expert for expert in args[1].flatten().tolist() if 0 <= expert < self._fused.num_experts})
        self._cache.route([self._first + expert for expert in routed])
        visit = _Visit(self._fused, self._first, streamer.visits)
        stand_ins = {name: _StandIn(visit, index) for index, name in enumerate(self._fused.names)}
        with streamer.saving():
            self._module.__dict__.update(stand_ins)
            try:
                return self._loop(*args)
            finally:
                for name in stand_ins:
                    del self._module.__dict__[name]
                visit.leave()


class _Visit:
    """The expert that a fused module uses now: one at a time, until the next one is asked for."""

    def __init__(self, fused: FusedExperts, first: int, visits: Visits) -> None:
        self.fused = fused
        self.visits = visits
        self._first = first
        self._expert: int | None = None
        self._num_uses = 0

    def part(self, index: int, expert: int) -> Tensor:
        if expert != self._expert:
            if self._expert is not None and self._uses(self._expert) > self._num_uses:
                raise RuntimeError(
                    f"{self.fused.name!r} still holds weights of expert {self._expert} as it asks for those of expert "
                    f"{expert}, and their bytes are about to be another's; stream it with its block: experts=None"
                )
            self.leave()
            self.visits.begin(self._first + expert)
            self._expert, self._num_uses = expert, self._uses(expert)
        return self._slice(expert).visiting(index)

    def _slice(self, expert: int) -> ExpertSlice:
        layer = self.visits.layers[self._first + expert]
        assert isinstance(layer, ExpertSlice)
        return layer

    def _uses(self, expert: int) -> int:
        """Of the expert's weights: names for them, and tensors over them."""
        return self.visits.num_views() + self._slice(expert).num_holders()

    def leave(self) -> None:
        """All use of the expert was submitted."""
        if self._expert is None:
            return
        changed = self.visits.end(self._first + self._expert)
        expert, self._expert = self._expert, None
        if changed is not None:
            raise RuntimeError(
                f"{self.fused.name!r} changed its weight {self.fused.names[changed]}[{expert}] in place while it ran: "
                f"the change would be lost with the copy on the device; stream it with its block: experts=None"
            )


class _StandIn:
    """Stands in for a parameter of fused experts: indexing it by an expert gives that expert's part."""

    def __init__(self, visit: _Visit, index: int) -> None:
        param = visit.fused.params[index]
        self.shape, self.dtype, self.ndim, self.device = param.shape, param.dtype, param.ndim, visit.visits.arena.device
        self._visit = visit
        self._index = index

    def __getitem__(self, expert: int | Tensor) -> Tensor:
        if isinstance(expert, Tensor) and expert.numel() != 1:
            self._refuse()
        return self._visit.part(self._index, int(expert) % self.shape[0])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        next(arg for arg in args if isinstance(arg, _StandIn))._refuse()
        raise AssertionError

    def _refuse(self) -> NoReturn:
        raise TypeError(
            f"{self._visit.fused.name!r} uses {self._visit.fused.names[self._index]} of several experts at once, which "
            f"are not on the device together; stream experts with their block: experts=None"
        )
