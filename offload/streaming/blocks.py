"""Which parts of a model are streamed: its repeated blocks, and what must not be cut out of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offload.streaming.piecewise import PiecewiseParameter
from offload.streaming.quantised import is_composite, plain_parts

# Integer tensors of two dimensions and more are quantised weights: as buffers they are streamed as parameters are.
QUANTISED_DTYPES = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32})


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """A parameter or buffer of a block. The tensor object is the model's own."""

    name: str  # within the model
    tensor: Tensor


@dataclass(frozen=True, slots=True)
class Block:
    """One unit of streaming.

    Attributes:
        name: of the module within the model.
        weights: what is streamed of it, each once. The rest of it stays on the device: small and mutable buffers,
            weights shared with another block or with the rest of the model, trainable adapters on a frozen block.
    """

    name: str
    module: nn.Module
    weights: tuple[NamedTensor, ...]

    @property
    def is_piecewise(self) -> bool:
        """Whether files hold it in pieces that no tensor in memory could show."""
        return any(isinstance(weight.tensor, PiecewiseParameter) for weight in self.weights)


def find_blocks(model: nn.Module, blocks: Sequence[str | nn.Module] | None = None) -> list[tuple[str, nn.Module]]:
    """The modules to stream, with their names, in the order of the model; none inside another.

    Args:
        blocks: names or modules; a ModuleList, Sequential or ModuleDict stands for its children. None finds the
            classes that the model declares indivisible (``_no_split_modules``), else the children of its outermost
            ModuleLists and Sequentials.

    Raises:
        ValueError: if there are none, or one of ``blocks`` is not of the model or inside another.
    """
    if blocks is not None:
        return _named_blocks(model, blocks)
    declared = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    found = list(_outermost(model, "", lambda module: type(module).__name__ in declared)) if declared else []
    found = found or [child for _, owner in _outermost(model, "", _is_container) for child in _children(model, owner)]
    found = [(name, module) for name, module in found if _has_weights(module)]
    if len(found) < 2:
        raise ValueError(
            f"{type(model).__name__} has no repeated blocks to stream: no ModuleList or Sequential of at least two "
            f"modules with weights; name them with blocks=[...]"
        )
    return found


def _is_container(module: nn.Module) -> bool:
    is_list = isinstance(module, (nn.ModuleList, nn.Sequential))
    return is_list and sum(_has_weights(child) for child in module.children()) >= 2


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


def _outermost(module: nn.Module, name: str, wanted: object) -> Iterator[tuple[str, nn.Module]]:
    """Modules for which ``wanted`` holds, depth first, without looking into them; each once."""
    assert callable(wanted)
    seen: set[int] = set()

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        if wanted(module):
            yield name, module
            return
        for child_name, child in module.named_children():
            yield from walk(child, f"{name}.{child_name}" if name else child_name)

    yield from walk(module, name)


def _children(model: nn.Module, container: nn.Module) -> list[tuple[str, nn.Module]]:
    names = {id(module): name for name, module in model.named_modules()}
    return [(names[id(child)], child) for child in container.children()]  # a child listed twice comes once


def _named_blocks(model: nn.Module, blocks: Iterable[str | nn.Module]) -> list[tuple[str, nn.Module]]:
    by_name = dict(model.named_modules())
    names = {id(module): name for name, module in by_name.items()}
    chosen: dict[str, nn.Module] = {}
    for block in blocks:
        module = by_name.get(block) if isinstance(block, str) else block
        if module is None or id(module) not in names:
            raise ValueError(f"blocks names {block!r}, which is no module of {type(model).__name__}")
        if isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
            chosen.update((names[id(child)], child) for child in module.children() if _has_weights(child))
        elif _has_weights(module):
            chosen[names[id(module)]] = module
        else:
            raise ValueError(f"block {names[id(module)]!r} has no weights to stream; leave it out of blocks")
    for name in chosen:
        if inside := [outer for outer in chosen if outer != name and name.startswith(f"{outer}." if outer else "")]:
            raise ValueError(f"block {name!r} lies inside block {inside[0]!r}; name one of them")
    position = {name: i for i, name in enumerate(by_name)}
    return sorted(chosen.items(), key=lambda item: position[item[0]])


def collect_weights(
    model: nn.Module, found: Sequence[tuple[str, nn.Module]], without: Iterable[Tensor] = ()
) -> list[Block]:
    """Each block with what is streamed of it, ``without`` those of its weights that go another way.

    Raises:
        TypeError: for a weight whose bytes are not those of plain dense tensors, or quantised and trained.
        ValueError: for trainable weights of a block that overlap in memory without being one parameter.
    """
    uses = _uses(model)
    elsewhere = {id(tensor) for tensor in without}
    result = []
    for name, module in found:
        trainable = [p.requires_grad for p in module.parameters()]
        # Trainable weights beside frozen ones are adapters (LoRA): small, and read by the optimizer at every step.
        is_adapted = any(trainable) and not all(trainable)
        inner_uses = _uses(module)
        weights = []
        for tensor_name, tensor in _all_tensors(module, remove_duplicate=True):
            full_name = f"{name}.{tensor_name}" if name else tensor_name
            is_adapter = is_adapted and tensor.requires_grad
            _check_quantised(full_name, tensor)
            if is_adapter or not _is_streamable(tensor):
                continue
            for part_name, part in plain_parts(full_name, tensor):
                is_shared = uses[id(part)] > inner_uses[id(part)]
                if id(part) in elsewhere or is_shared or part.numel() == 0:
                    continue
                _check_plain(part_name, part)
                weights.append(NamedTensor(part_name, part))
        if weights:
            result.append(Block(name, module, tuple(weights)))
    _check_overlaps(result)
    return result


def _all_tensors(module: nn.Module, *, remove_duplicate: bool) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=remove_duplicate)
    yield from module.named_buffers(remove_duplicate=remove_duplicate)


def _uses(module: nn.Module) -> Counter[int]:
    """How often each plain tensor is a parameter or buffer, or part of one, by its id."""
    tensors = _all_tensors(module, remove_duplicate=False)
    return Counter(id(part) for name, tensor in tensors for _, part in plain_parts(name, tensor))


def _is_streamable(tensor: Tensor) -> bool:
    if tensor.numel() == 0:
        return False
    return isinstance(tensor, nn.Parameter) or (tensor.ndim >= 2 and tensor.dtype in QUANTISED_DTYPES)


def _check_quantised(name: str, tensor: Tensor) -> None:
    if hasattr(tensor, "SCB"):
        raise TypeError(
            f"{name} is a {type(tensor).__name__} of bitsandbytes' 8-bit layers, which keep what they compute from it "
            f"from call to call, on one device; quantise to 4 bits, or with torchao"
        )
    if tensor.requires_grad and is_composite(tensor):
        raise TypeError(
            f"{name} is a {type(tensor).__name__}, made of several tensors, and is trained: no gradient of its own "
            f"could be brought to it; freeze it, or keep its block on the device by leaving it out of blocks"
        )


def _check_plain(name: str, tensor: Tensor) -> None:
    is_wrapper = hasattr(tensor, "__tensor_flatten__")
    if is_wrapper or tensor.layout != torch.strided or tensor.is_quantized:
        raise TypeError(
            f"{name} is a {type(tensor).__name__} with layout {tensor.layout}: its bytes are not those of one dense "
            f"tensor, so it cannot be streamed; keep its block on the device with resident=[names] or leave it out "
            f"of blocks"
        )


def _check_overlaps(blocks: Sequence[Block]) -> None:
    """Two parameters over the same memory would become two copies, and training would move them apart."""
    owners: dict[int, NamedTensor] = {}
    for weight in (weight for block in blocks for weight in block.weights):
        if weight.tensor.device.type == "meta":
            continue
        other = owners.setdefault(weight.tensor.data_ptr(), weight)
        if other is not weight and (weight.tensor.requires_grad or other.tensor.requires_grad):
            raise ValueError(
                f"{other.name} and {weight.name} are two parameters over the same memory; make them one parameter "
                f"(module_b.weight = module_a.weight), or freeze both"
            )
