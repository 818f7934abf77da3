"""Making a model stream: its blocks, its budget, and what is refused before anything is moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from os import PathLike

import torch
from torch import Tensor, nn

from offload.accelerators import accelerator_for
from offload.hardware import HardwareProfile
from offload.pool import BudgetError, parse_bytes
from offload.streaming.activations import Example, Workload, activations
from offload.streaming.arena import ALIGN_BYTES
from offload.streaming.blocks import Block, collect_weights, find_blocks
from offload.streaming.checkpoint import is_mapped, spill
from offload.streaming.experts import Experts, find_experts
from offload.streaming.handle import Parts, Refusal, StreamHandle, device_bytes_of
from offload.streaming.host_memory import check_room
from offload.streaming.newcomers import all_tensors
from offload.streaming.packing import Packing
from offload.streaming.piecewise import PiecewiseParameter
from offload.streaming.placement import Room, StreamPlan, place
from offload.streaming.prediction import Machine

_RESERVE_SHARE = 8  # of the budget is left for activations and caches where nobody says how much they take


def stream(
    model: nn.Module,
    device_budget: int | str,
    *,
    device: str | torch.device | None = None,
    blocks: Sequence[str | nn.Module] | None = None,
    window: int | None = None,
    evict_batch: int = 1,
    resident: str | int | Sequence[str] = "auto",
    experts: str | int | None = "auto",
    reserve: int | str | None = None,
    example: Example | None = None,
    new_tokens: int = 0,
    disk: str | PathLike[str] | None = None,
    disk_blocks: Sequence[str] | None = None,
    profile: HardwareProfile | str | PathLike[str] | None = None,
    progress: bool = False,
    verbose: bool = True,
) -> StreamHandle:
    """Make ``model`` run on the accelerator with its weights in host memory: each block visits when it is called.

    The model object stays the same and is called as before; ``generate()`` of transformers works, with its cache on the
    device. Blocks that the budget holds stay on the device, evenly spread among those that are streamed, and so does
    everything outside blocks. The method is that of *Superpipeline* (arXiv 2410.08791), with its k and k' chosen from
    the budget.

    Args:
        model: on any device; afterwards its streamed weights are in pinned host memory between calls.
        device_budget: bytes of device memory for weights, the streaming buffer and ``reserve``, as an int or "6GiB".
        device: where to run; None for the accelerator of the process.
        blocks: names or modules to stream, lists standing for their children; None finds the repeated ones.
        window: streamed blocks on the device at a time (the paper's k); None takes 2, or up to 4 where
            that shortens the predicted pass.
        evict_batch: finished blocks that give up their places together (the paper's k').
        resident: "auto" keeps what the budget holds on the device; a number of bytes, or a size as "2GiB", is an upper
            bound on that; names are exactly the blocks that stay.
        experts: device memory that caches a mixture's experts, which are loaded when they are routed to: "auto" takes
            what blocks leave of the budget; a number of bytes, or a size, is an upper bound; None streams experts with
            their block.
        reserve: part of the budget left for activations, caches, gradients and adapters; None for what ``example``
            takes, or an eighth of the budget where there is none.
        example: arguments of the largest call that will be made, by name or in order; their shapes and dtypes count.
            What the call takes, with its backward if the model is in training mode and has trainable weights, is found
            by making it without memory, before anything is moved; of a mixture, with all tokens going to the same
            experts.
        new_tokens: most tokens that ``generate()`` adds to those of ``example``.
        disk: keep streamed weights in files of this folder instead of host memory, and read them ahead into a pinned
            ring of a few blocks. Weights that ``stream_from_pretrained`` mapped stay in the checkpoint's files.
        disk_blocks: names of blocks that live in files, the others in host memory; None for all that can.
        profile: the machine to predict passes for; None measures the link and predicts that alone.
        progress: show a progress bar over the blocks of each pass, or of all passes of a ``generate()``, with the time
            to go (needs tqdm).
        verbose: print where everything lives and how long a pass should take.

    Raises:
        offload.BudgetError: if the budget does not hold the least that would do.
        ValueError, TypeError: for arguments or models that cannot be streamed, naming what and why.
    """
    if evict_batch < 1 or (window is not None and window < evict_batch):
        raise ValueError(f"window={window} and evict_batch={evict_batch}: give 1 <= evict_batch <= window")
    _refuse_hooked(model)
    budget_bytes = parse_bytes(device_budget, "device_budget")
    if budget_bytes is None:
        raise TypeError('device_budget must be bytes or a text such as "6GiB", not None')
    reserve_bytes = parse_bytes(reserve, "reserve")
    workload = _workload(model, example, new_tokens, reserve)
    accelerator = accelerator_for(_device(device))
    modules = find_blocks(model, blocks)
    mixture = Experts() if experts is None else find_experts(model, modules)
    found = collect_weights(model, modules, without=mixture.tensors())
    if not found and not mixture:
        raise ValueError("no block has weights of its own to stream; name others with blocks=[...]")
    _refuse_piecewise(model, mixture)
    packings = [Packing(block.weights) for block in found]
    visiting = {id(weight.tensor) for block in found for weight in block.weights} | {id(t) for t in mixture.tensors()}
    base = [tensor for tensor in all_tensors(model) if id(tensor) not in visiting]
    weights = [weight.tensor for block in (*found, *mixture.separate) for weight in block.weights]
    taken = None if workload is None else activations(model, accelerator.device, workload, weights, mixture.fused)
    if reserve_bytes is None:
        reserve_bytes = budget_bytes // _RESERVE_SHARE if taken is None else taken.peak_bytes
    room = Room(
        budget_bytes=budget_bytes,
        base_bytes=device_bytes_of(base),
        experts_bytes=mixture.least_cache_bytes,
        reserve_bytes=reserve_bytes,
        gradient_share=_trained_share(weights) if workload is not None and workload.trains else 0.0,
        freed_bytes=0 if taken is None else taken.peak_bytes - taken.last_bytes,
        window=window,
        evict_batch=evict_batch,
        resident=_resident(resident),
    )
    if profile is not None and not isinstance(profile, HardwareProfile):
        profile = HardwareProfile.load(profile)
    block_bytes = [packing.num_bytes for packing in packings]
    machine = None if profile is None else machine_of(profile, block_bytes)
    plan = place([block.name for block in found], block_bytes, room, machine)
    units = [found[i] for i in plan.streamed] + mixture.as_blocks()
    on_disk = _on_disk(units, disk, disk_blocks)
    check_room(_host_bytes(units, on_disk), "streamed weights need, beyond the host memory that they have now,")
    if disk is not None:
        spill([unit for unit in on_disk if not is_mapped(unit)], disk)
    room = replace(
        room,
        experts_bytes=cache_bytes(mixture, plan, room, experts),
        reserve_bytes=room.reserve_bytes + room.gradient_bytes(plan.resident_bytes),
    )
    parts = Parts(model, found, packings, base, mixture, plan, room, mapped=frozenset(unit.name for unit in on_disk))
    try:
        handle = StreamHandle(parts, accelerator, progress=progress)
    except BaseException:  # out of memory; each weight was moved as a whole or not at all
        for tensor in all_tensors(model):
            if not isinstance(tensor, PiecewiseParameter):
                tensor.data = tensor.data.to("cpu")
        raise
    handle.machine = handle.measure_link() if machine is None else machine
    if verbose:
        print(handle.explain())
    return handle


def _workload(model: nn.Module, example: Example | None, new_tokens: int, reserve: int | str | None) -> Workload | None:
    if example is None:
        if new_tokens:
            raise ValueError(f"new_tokens={new_tokens} continue an example; give example=tokenizer(...) too")
        return None
    if reserve is not None:
        raise ValueError("give reserve or example, not both: an example predicts what to reserve")
    return Workload(example, new_tokens, trains=model.training and any(p.requires_grad for p in model.parameters()))


def _on_disk(units: Sequence[Block], disk: str | PathLike[str] | None, names: Sequence[str] | None) -> list[Block]:
    """The streamed blocks and experts that live in files: in those they are mapped from, or else in ``disk``."""
    chosen = [unit for unit in units if unit.is_piecewise or names is None or unit.name in names]
    if disk is not None:
        return chosen
    if names is not None and not all(is_mapped(unit) for unit in chosen):
        raise ValueError("disk_blocks names what lives on disk; say in which folder with disk")
    return [unit for unit in chosen if is_mapped(unit)]


def _host_bytes(units: Sequence[Block], on_disk: Sequence[Block]) -> int:
    """Host memory that units which are not on disk take beyond what they have, which goes back weight by weight."""
    names = {unit.name for unit in on_disk}
    needed_bytes = 0
    for unit in units:
        if unit.name in names:
            continue
        needed_bytes += Packing(unit.weights).num_bytes
        if not is_mapped(unit):
            needed_bytes -= sum(w.tensor.nbytes for w in unit.weights if w.tensor.device.type == "cpu")
    return needed_bytes


def _trained_share(weights: Sequence[Tensor]) -> float:
    trained_bytes = sum(weight.nbytes for weight in weights if weight.requires_grad)
    return trained_bytes / max(1, sum(weight.nbytes for weight in weights))


def cache_bytes(experts: Experts, plan: StreamPlan, room: Room, limit: str | int | None) -> int:
    """The cache of experts: what blocks leave of the budget, as far as there are experts, and the user's limit."""
    if not experts:
        return 0
    left_bytes = room.experts_bytes + room.blocks_bytes - plan.resident_bytes - plan.arena_bytes
    left_bytes -= room.gradient_bytes(plan.resident_bytes)
    most_bytes = left_bytes if limit == "auto" else parse_bytes(limit, "experts") or 0
    if most_bytes < room.experts_bytes:
        raise BudgetError(
            f"experts={limit!r} is less than two experts, {room.experts_bytes} bytes, which the cache needs at least"
        )
    return min(sum(experts.expert_bytes()), left_bytes, most_bytes // ALIGN_BYTES * ALIGN_BYTES)


def _resident(resident: str | int | Sequence[str]) -> str | int | tuple[str, ...]:
    if resident == "auto":
        return "auto"
    if isinstance(resident, (str, int)):
        return parse_bytes(resident, "resident") or 0
    return tuple(resident)


def _device(device: str | torch.device | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    found = torch.accelerator.current_accelerator()
    if found is None:
        raise ValueError("there is no accelerator to stream to; offload.testing.sim.load() registers the emulated one")
    return found


def _refuse_hooked(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if hasattr(module, "_hf_hook"):
            raise ValueError(
                f"module {name or 'model'!r} is offloaded by accelerate already; remove its hooks first "
                f"(accelerate.hooks.remove_hook_from_submodules)"
            )
        if isinstance(module.__dict__.get("_apply"), Refusal):
            raise ValueError(f"module {name or 'model'!r} streams already; call remove() on its handle first")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type == "meta" and not isinstance(tensor, PiecewiseParameter):
            raise ValueError(
                f"{name} is on the meta device and has no values; load the model's weights first, or use "
                f"offload.stream_from_pretrained for a checkpoint that does not fit host memory"
            )


def _refuse_piecewise(model: nn.Module, mixture: Experts) -> None:
    """Experts in files that name each of them can only be loaded one by one."""
    streamed = {id(tensor) for tensor in mixture.tensors()}
    for name, param in model.named_parameters():
        if isinstance(param, PiecewiseParameter) and id(param) not in streamed:
            raise ValueError(
                f"the checkpoint has {name} in pieces, an expert each, so they can only be loaded one by one, which "
                f"needs experts other than None, the experts inside a block, and frozen, and a module that is called "
                f"with (hidden_states, top_k_index, top_k_weights); or load the model and give a folder: disk="
            )


def machine_of(profile: HardwareProfile, block_bytes: Sequence[int]) -> Machine:
    """A named machine on which every block reads its weights once: one token, the least a pass computes."""
    return Machine(
        link_bytes_per_s=profile.h2d_bytes_per_s,
        copy_latency_s=profile.copy_latency_s,
        compute_s=tuple(
            profile.forward_layer_latency_s + num_bytes / profile.device_memory_bytes_per_s for num_bytes in block_bytes
        ),
    )
