"""What the user holds of a model that streams."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from offload.accelerators import Accelerator
from offload.lanes.accelerator import StreamLane, accelerator_lanes
from offload.pool import BudgetError, format_bytes
from offload.streaming.arena import Arena, round_up
from offload.streaming.blocks import Block
from offload.streaming.engine import Engine, Loader
from offload.streaming.expert_cache import BlocksAndExperts, ExpertCache
from offload.streaming.experts import Experts, FusedExperts, FusedForward, expert_layers
from offload.streaming.gradients import StreamedGradients
from offload.streaming.host_memory import HostMemory, check_room
from offload.streaming.newcomers import Newcomers
from offload.streaming.order import CallOrder
from offload.streaming.packing import PackedLayer, Packing
from offload.streaming.piecewise import PiecewiseParameter
from offload.streaming.placement import Room, StreamBill, StreamPlan
from offload.streaming.prediction import Machine, PassPrediction
from offload.streaming.progress import Progress, WatchedGenerate
from offload.streaming.quantised import plain_parts
from offload.streaming.sources import HostSource
from offload.streaming.streamer import Streamer
from offload.streaming.wrapping import WrappedForward

_MOVERS = "to(), cuda(), cpu(), half() and the like"


def device_bytes_of(tensors: Iterable[Tensor]) -> int:
    """What tensors take on the device, as its allocator counts."""
    return sum(round_up(tensor.numel() * tensor.itemsize) for tensor in tensors)


@dataclass(frozen=True, slots=True)
class Parts:
    """A model taken apart.

    Attributes:
        blocks, packings: every block, and how its weights lie together.
        base: parameters and buffers that are no streamed weights of any block, and no experts.
        mapped: names of the streamed blocks and experts whose weights lie in mapped files, and stay there.
    """

    model: nn.Module
    blocks: Sequence[Block]
    packings: Sequence[Packing]
    base: Sequence[Tensor]
    experts: Experts
    plan: StreamPlan
    room: Room
    mapped: frozenset[str]


class Refusal:
    """Stands in for a module's ``_apply``, through which all methods that move or cast it go, and refuses copies."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(
            f"{_MOVERS} would move weights of {self._name} that are streamed to the device as it runs; leave the model "
            f"where it is, or call remove() on the handle that offload.stream returned first"
        )

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Copying or pickling the module comes here too. The copy's forward would run the original."""
        raise TypeError(
            f"{self._name} streams and cannot be copied or pickled: save its state_dict(), or call remove() first"
        )


class StreamHandle:
    """A model that streams. Made by :func:`offload.stream`.

    Attributes:
        plan: where each block lives.
        bill: what streaming takes, in bytes.
        machine: what predictions are made for.
        expert_cache: what is on the device of a mixture's experts; None without.
    """

    def __init__(self, parts: Parts, accelerator: Accelerator, *, progress: bool) -> None:
        plan, blocks, packings = parts.plan, parts.blocks, parts.packings
        self.plan = plan
        self.machine = Machine(1.0, (0.0,) * len(blocks))
        self._model = parts.model
        self._budget_bytes = parts.room.budget_bytes
        self._accelerator = accelerator
        self._device = accelerator.device
        self._lanes = accelerator_lanes(self._device)
        self._base = list(parts.base)
        streamed = [blocks[i] for i in plan.streamed]
        self._residents = [weight.tensor for i in plan.resident for weight in blocks[i].weights]
        host = HostMemory(accelerator)
        self._layers = [
            PackedLayer.mapped(blocks[i].weights, packings[i])
            if blocks[i].name in parts.mapped
            else PackedLayer.in_memory(blocks[i].weights, packings[i], *host.slab(packings[i].num_bytes))
            for i in plan.streamed
        ]
        self._layers += expert_layers(parts.experts, host, parts.mapped)
        self._streamed = {id(tensor) for layer in self._layers for tensor in layer.tensors}
        for i in plan.resident:
            _move_packed(blocks[i], packings[i], self._device)
        for tensor in self._base:
            tensor.data = tensor.data.to(self._device)
        self._arena = torch.empty(plan.arena_bytes + parts.room.experts_bytes, dtype=torch.uint8, device=self._device)
        if isinstance(self._lanes.h2d, StreamLane):
            self._arena.record_stream(self._lanes.h2d.stream)
        ring = host.ring(self._layers)
        self.bill = StreamBill(
            base_bytes=parts.room.base_bytes,
            resident_bytes=plan.resident_bytes,
            arena_bytes=plan.arena_bytes,
            experts_bytes=parts.room.experts_bytes,
            reserve_bytes=parts.room.reserve_bytes,
            host_bytes=host.num_bytes,
            pinned_bytes=host.pinned_bytes,
        )
        self._source = HostSource(self._layers, self._arena, ring, self._lanes, accelerator)
        self.expert_cache = self._make_cache(parts, len(streamed))
        engine = self._make_engine(len(streamed))
        bar = Progress(len(streamed), plan.streamed_bytes) if progress else None
        units = [*streamed, *parts.experts.separate]
        self._streamer = Streamer(
            units, self._layers, self._arena, engine, self._lanes, before_pass=self._before_pass, progress=bar
        )
        self._newcomers = Newcomers(parts.model)
        self._wrapped: list[WrappedForward | FusedForward | WatchedGenerate] = []
        self._wrap(blocks, units, parts.experts.fused)
        if bar is not None and hasattr(parts.model, "generate"):
            self._wrapped.append(WatchedGenerate(parts.model, bar))

    def _make_cache(self, parts: Parts, first: int) -> ExpertCache | None:
        if not parts.experts:
            return None
        expert_bytes = dict(enumerate((layer.num_bytes for layer in self._layers[first:]), start=first))
        begin, num_bytes = parts.plan.arena_bytes, parts.room.experts_bytes
        return ExpertCache(expert_bytes, self._source, self._lanes, begin=begin, num_bytes=num_bytes)

    def _make_engine(self, num_blocks: int) -> Loader:
        engine = Engine(
            [layer.num_bytes for layer in self._layers[:num_blocks]],
            self._source,
            Arena(self.plan.arena_bytes),
            CallOrder(num_blocks),
            self._lanes,
            window=self.plan.window,
            evict_batch=self.plan.evict_batch,
        )
        return engine if self.expert_cache is None else BlocksAndExperts(engine, self.expert_cache, num_blocks)

    def _wrap(self, blocks: Sequence[Block], units: Sequence[Block], fused: Sequence[FusedExperts]) -> None:
        refusal = Refusal(type(self._model).__name__)
        visitors = [unit.module for unit in units] + [group.module for group in fused]
        visited = {id(module) for module in visitors}
        around = [module for module in _modules_around(self._model, blocks) if id(module) not in visited]
        self._guarded = [*around, *visitors]
        for module in self._guarded:
            module.__dict__["_apply"] = refusal
        self._wrapped += [WrappedForward(module, self._streamer.around_model) for module in around]
        for layer, unit in enumerate(units):
            self._wrapped.append(WrappedForward(unit.module, partial(self._streamer.around_block, layer)))
        first = len(units)
        for group in fused:
            assert self.expert_cache is not None
            self._wrapped.append(FusedForward(group, first, self._streamer, self.expert_cache))
            first += group.num_experts

    # ---- while it streams

    def _before_pass(self) -> None:
        self._adopt_newcomers()
        if self._streamer.trains():
            self._prepare_gradients()

    def _prepare_gradients(self) -> None:
        """Host memory for the gradients of streamed weights, at the first pass that trains them."""
        gradients = self._streamer.backward.gradients
        if gradients is not None and gradients.covers(self._layers):
            return
        if gradients is not None:
            gradients.remove()
        trained = [layer for layer in self._layers if any(tensor.requires_grad for tensor in layer.tensors)]
        check_room(sum(layer.num_bytes for layer in trained), "gradients of streamed weights need")
        host = HostMemory(self._accelerator)
        self._streamer.backward.gradients = StreamedGradients(
            self._layers, self._lanes, lambda num_bytes: host.slab(num_bytes)[0], self._streamer.backward.open
        )
        self.bill = replace(
            self.bill,
            host_bytes=self.bill.host_bytes + host.num_bytes,
            pinned_bytes=self.bill.pinned_bytes + host.pinned_bytes,
        )

    def host_parameters(self) -> list[nn.Parameter]:
        """The model's parameters that live in host memory between passes, and their gradients with them.

        An optimizer over these runs on the CPU; one over :meth:`device_parameters` on the device.
        """
        return [param for param in self._model.parameters() if self._is_streamed(param)]

    def device_parameters(self) -> list[nn.Parameter]:
        """The model's parameters that stay on the device, adapters that joined since the last call included."""
        self._adopt_newcomers()
        return [param for param in self._model.parameters() if not self._is_streamed(param)]

    def _is_streamed(self, param: nn.Parameter) -> bool:
        return any(id(part) in self._streamed for _, part in plain_parts("", param))

    def _adopt_newcomers(self) -> None:
        """Weights that joined the model since the last pass stay on the device."""
        found = self._newcomers.find()
        if not found:
            return
        num_bytes = device_bytes_of(found)
        bill = replace(self.bill, base_bytes=self.bill.base_bytes + num_bytes)
        if bill.weight_bytes > self._budget_bytes:
            raise BudgetError(
                f"{len(found)} weights of {format_bytes(num_bytes)} joined the model, and with them it takes "
                f"{format_bytes(bill.weight_bytes)} of a device_budget of {format_bytes(self._budget_bytes)}; call "
                f"remove() and stream again with a larger device_budget, or add them before streaming"
            )
        for tensor in found:
            tensor.data = tensor.data.to(self._device)
        self._base += found
        self.bill = bill

    def predict(self) -> PassPrediction:
        """One forward pass in the steady state, on the machine at hand or the profile's."""
        return self.plan.predict(self.machine)

    def measure_link(self) -> Machine:
        """The rate at which the largest streamed block goes up now. Computing is taken to cost nothing."""
        nothing = (0.0,) * len(self.plan.names)
        pinned = [piece for layer in self._layers for _, piece in layer.pinned() or ()]
        if not pinned:
            return Machine(float("inf"), nothing)
        slab = max(pinned, key=lambda piece: piece.nbytes)
        lane = self._lanes.h2d
        assert isinstance(lane, StreamLane)
        begin, end = (torch.Event(self._device, enable_timing=True) for _ in range(2))
        with lane.stream:
            lane.stream.wait_event(torch.accelerator.current_stream(self._device).record_event())
            for event in (begin, end):  # the first copy warms up
                event.record(lane.stream)
                self._arena[: slab.nbytes].copy_(slab, non_blocking=True)
            last = torch.Event(self._device, enable_timing=True)
            last.record(lane.stream)
        last.synchronize()
        return Machine(slab.nbytes / (end.elapsed_time(last) * 1e-3), nothing)

    def explain(self) -> str:
        """Where everything lives, what it takes, how long a pass takes at least and what binds."""
        lines = [self.plan.table(), str(self.bill)]
        if self.plan.streamed and self.machine.link_bytes_per_s != float("inf"):
            prediction = self.predict()
            bounds = ", ".join(f"{name} {seconds * 1e3:.2f} ms" for name, seconds in prediction.bound_s.items())
            lines.append(
                f"a pass takes {prediction.pass_s * 1e3:.2f} ms as predicted, {prediction.binds} binds "
                f"({bounds}; link {self.machine.link_bytes_per_s / 1e9:.2f} GB/s)"
            )
            if not any(self.machine.compute_s):
                lines.append("computing is not counted: give profile= for a prediction with it")
        if self.expert_cache is not None:
            lines.append(str(self.expert_cache))
        return "\n".join(lines)

    def synchronize(self) -> None:
        """Wait for everything in flight."""
        self._lanes.synchronize()

    def remove(self) -> None:
        """Stop streaming: the model is an ordinary one on the CPU again. Calling it twice does nothing.

        Raises:
            BudgetError: before anything is done, if host memory does not hold experts that files hold in pieces.
        """
        apart = [param for param in self._model.parameters() if isinstance(param, PiecewiseParameter)]
        check_room(sum(param.nbytes for param in apart), "experts that files hold apart take, put together,")
        for wrapped in self._wrapped:
            wrapped.remove()
        for module in self._guarded:
            module.__dict__.pop("_apply", None)
        self._wrapped, self._guarded = [], []
        self._newcomers.remove()
        self.synchronize()
        for tensor in (*self._base, *self._residents):
            tensor.data = tensor.data.to("cpu")
        self._base, self._residents = [], []
        self._streamer.close()
        self._source.close()
        self._arena = self._arena.new_empty(0)


def _move_packed(block: Block, packing: Packing, device: torch.device) -> None:
    flat = torch.empty(packing.num_bytes, dtype=torch.uint8, device=device)
    for weight, view in zip(block.weights, packing.views(flat), strict=True):
        view.copy_(weight.tensor.data)
        weight.tensor.data = view


def _modules_around(model: nn.Module, streamed: Sequence[Block]) -> list[nn.Module]:
    """The model, and the modules between it and the streamed blocks that can be called."""
    names = {""}
    for block in streamed:
        parts = block.name.split(".")
        names |= {".".join(parts[:i]) for i in range(1, len(parts))}
    modules = [module for name, module in model.named_modules() if name in names]
    return [module for module in modules if type(module).forward is not nn.Module.forward]
