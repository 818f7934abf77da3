"""One operator of torch's OpInfo database on the emulated device against the CPU, check by check.

Of a device's operator the CPU is the reference: the same samples, on tensors with the same strides, must give the same
bits, or values within the operator's own tolerance (torch's own tests declare those).
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.testing._internal.common_device_type import toleranceOverride
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from offload.testing import sim

OPERATORS: dict[str, Any] = {op.full_name: op for op in op_db}
VARIANTS = ("forward", "backward", "in-place", "out")
# Both dtypes, or, of operators that have neither on the CPU, the first of the others that they have.
DTYPES = (torch.float32, torch.bfloat16)
OTHER_DTYPES = (torch.int64, torch.complex64, torch.int32, torch.uint8, torch.bool)

INDICES_ON_CPU = ("tensor_split",)  # where split points must be known to the host, on CUDA too


class Outcome(NamedTuple):
    """What one check found, the worst of its samples.

    status: "equal" (bit for bit), "close" (within the tolerance), "random" (another generator's numbers: same shape and
        dtype, and the same again with the same seed), "undefined" (the values are: same shape and dtype), "disagree",
        or "unsupported" (by the CPU).
    """

    check: str
    status: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class _Sample:
    """Arguments of one call; on the device, copies of those on the CPU."""

    input: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    take: Callable[[Any], Any]  # of the results, what has a gradient

    def on_device(self, *, with_args: bool) -> _Sample:
        """``with_args``: the other tensors too, not only the first."""
        moved = self._map(_to_device)
        return moved if with_args else replace(self, input=moved.input)

    def clone(self) -> _Sample:
        return self._map(_clone)

    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in tree_leaves((self.input, self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def _map(self, change: Callable[[Any], Any]) -> _Sample:
        return _Sample(*tree_map(change, (self.input, self.args, self.kwargs)), take=self.take)


def check_operator(name: str, num_samples: int, variants: tuple[str, ...] = VARIANTS) -> list[Outcome]:
    """All checks of one operator, on an idle device with executor "lazy", where work that comes too late shows."""
    op = OPERATORS[name]
    supported = op.supported_dtypes("cpu")
    dtypes = [dtype for dtype in DTYPES if dtype in supported]
    dtypes = dtypes or [dtype for dtype in OTHER_DTYPES if dtype in supported][:1]
    outcomes = []
    for variant, dtype in itertools.product(variants, dtypes):
        outcomes.append(_check(op, variant, dtype, num_samples))
        sim.configure("lazy", races=True)
    return outcomes


_ORDER = ("unsupported", "equal", "close", "random", "undefined", "disagree")  # of statuses, the worst last


def _check(op: Any, variant: str, dtype: torch.dtype, num_samples: int) -> Outcome:
    name = f"{variant} {str(dtype).removeprefix('torch.')}"
    worst = Outcome(name, "unsupported")
    if not _has_variant(op, variant, dtype):
        return worst
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for sample in _samples(op, dtype, num_samples, variant):
            status, reason = _check_sample(op, _CALLS[variant], sample, dtype)
            if (races := sim.races()) and not _is_empty(op):  # whose bytes nothing has written
                status, reason = "disagree", f"false race report: {races[0]}"
            if _ORDER.index(status) > _ORDER.index(worst.status):
                worst = Outcome(name, status, reason)
            if status == "disagree":
                break
    return worst


def _has_variant(op: Any, variant: str, dtype: torch.dtype) -> bool:
    match variant:
        case "backward":
            return bool(op.supports_autograd) and dtype in op.supported_backward_dtypes("cpu")
        case "in-place":
            return op.inplace_variant is not None
        case "out":
            return bool(op.supports_out)
    return True


def _samples(op: Any, dtype: torch.dtype, num_samples: int, variant: str) -> Iterator[_Sample]:
    samples = op.sample_inputs("cpu", dtype, requires_grad=variant == "backward")
    if variant == "in-place":  # the result has to fit into the input
        samples = (sample for sample in samples if not sample.broadcasts_input)
    for sample in itertools.islice(samples, num_samples):
        yield _Sample(sample.input, sample.args, sample.kwargs, sample.output_process_fn_grad)


def _check_sample(op: Any, call: Callable[[Any, _Sample], Any], sample: _Sample, dtype: torch.dtype) -> tuple[str, str]:
    device_sample = sample.on_device(with_args=op.name not in INDICES_ON_CPU)
    try:
        expected = _seeded(call, op, sample.clone())
    except Exception:  # noqa: BLE001 - whatever a foreign kernel raises: the CPU has no answer to compare with
        return "unsupported", ""
    try:
        actual = _on_cpu(_seeded(call, op, device_sample.clone()))
        _assert_close(actual, expected, op, dtype)
    except Exception as error:  # noqa: BLE001 - a wrong value, or whatever a foreign kernel raises
        with contextlib.suppress(Exception):
            torch.accelerator.synchronize()
        return _judge(op, call, sample, device_sample, expected, error)
    return ("equal" if _same_bits(actual, expected) else "close"), ""


def _judge(
    op: Any,
    call: Callable[[Any, _Sample], Any],
    sample: _Sample,
    device_sample: _Sample,
    expected: Any,
    error: Exception,
) -> tuple[str, str]:
    """A difference may be right, where the values are not defined or are drawn from a generator."""
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    draws = _Draws()
    try:
        with draws:
            _seeded(call, op, sample.clone())
        actual = _on_cpu(_seeded(call, op, device_sample.clone()))
        is_same_shape = _shapes(actual) == _shapes(expected)
        is_repeatable = _same_bits(actual, _on_cpu(_seeded(call, op, device_sample.clone())))
    except Exception:  # noqa: BLE001 - it fails again
        return "disagree", reason
    if is_same_shape and _is_empty(op):
        return "undefined", ""
    if is_same_shape and draws.seen and is_repeatable:
        return "random", ""
    return "disagree", reason


def _is_empty(op: Any) -> bool:
    """A factory of tensors whose values are not defined."""
    return "empty" in op.name


class _Draws(TorchDispatchMode):
    """Whether anything was drawn from a generator. (Comparing two seeds would not do: many samples set their own.)"""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


# ---- the variants: a call gives tensors to compare, nested as it likes


def _forward(op: Any, sample: _Sample) -> Any:
    return op(sample.input, *sample.args, **sample.kwargs)


def _backward(op: Any, sample: _Sample) -> Any:
    results = tree_leaves(sample.take(_forward(op, sample)))
    results = [result for result in results if isinstance(result, Tensor) and result.requires_grad]
    inputs = [tensor for tensor in sample.tensors() if tensor.requires_grad]
    if not results or not inputs:
        raise NotImplementedError("nothing here has a gradient")
    cotangents = [_cotangent(result).to(result.device) for result in results]
    return torch.autograd.grad(results, inputs, cotangents, allow_unused=True)


def _cotangent(result: Tensor) -> Tensor:
    """Not drawn from a generator: an operator that draws is known by that."""
    angles = torch.arange(result.numel(), dtype=torch.float32).reshape(result.shape)
    return (torch.polar(torch.ones_like(angles), angles) if result.is_complex() else angles.cos()).to(result.dtype)


def _in_place(op: Any, sample: _Sample) -> Any:
    result = op.inplace_variant(sample.input, *sample.args, **sample.kwargs)
    return result, sample.input


def _out(op: Any, sample: _Sample) -> Any:
    expected = _forward(op, sample)
    empty = torch.empty_like(expected) if isinstance(expected, Tensor) else tuple(map(torch.empty_like, expected))
    op(sample.input, *sample.args, **sample.kwargs, out=empty)
    return empty


_CALLS = {"forward": _forward, "backward": _backward, "in-place": _in_place, "out": _out}


def _seeded(call: Callable[[Any, _Sample], Any], op: Any, sample: _Sample) -> Any:
    torch.manual_seed(0)
    return call(op, sample)


# ---- moving and comparing


def _to_device(value: Any) -> Any:
    """The same tensor on the device: the whole storage moves, so strides, offset and overlaps stay."""
    if not isinstance(value, Tensor):
        return torch.device("sim") if isinstance(value, torch.device) or value == "cpu" else value
    if value.layout != torch.strided:
        return value.detach().to("sim").requires_grad_(value.requires_grad)
    whole = torch.empty(0, dtype=value.dtype).set_(value.detach().untyped_storage())  # type: ignore[call-overload]
    moved = whole.to("sim").as_strided(value.shape, value.stride(), value.storage_offset())
    if value.is_conj():
        moved = moved.conj()
    if value.is_neg():
        moved = torch._neg_view(moved)
    return moved.requires_grad_(value.requires_grad)


def _clone(value: Any) -> Any:
    """A copy that may be written; strides stay where copies can have them."""
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _on_cpu(result: Any) -> Any:
    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        assert value.device.type == "sim", f"the result is on {value.device}"
        return value.detach().cpu()

    return tree_map(move, result)


def _dense(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().resolve_conj().resolve_neg()
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def _assert_close(actual: Any, expected: Any, op: Any, dtype: torch.dtype) -> None:
    ours, theirs = tree_leaves(actual), tree_leaves(expected)
    assert len(ours) == len(theirs), f"{len(ours)} results, not {len(theirs)}"
    tolerance = _tolerance(op, dtype)
    for one, other in zip(ours, theirs, strict=True):
        if isinstance(other, Tensor):
            assert isinstance(one, Tensor), f"{one} instead of a tensor"
            one, other = _dense(one), _dense(other)
            torch.testing.assert_close(one, other, equal_nan=True, **tolerance)
        else:
            assert one == other or one != one, f"{one} instead of {other}"


def _tolerance(op: Any, dtype: torch.dtype) -> dict[str, float]:
    """The widest that torch's own tests allow this operator; theirs for the dtype if they say nothing."""
    declared = [
        decorator.d[dtype]
        for info in op.decorators
        for decorator in getattr(info, "decorators", [info])
        if isinstance(decorator, toleranceOverride) and dtype in decorator.d
    ]
    if not declared:
        return {}
    return {
        "atol": max(tolerance.atol for tolerance in declared),
        "rtol": max(tolerance.rtol for tolerance in declared),
    }


def _shapes(result: Any) -> list[object]:
    return [(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else type(leaf) for leaf in tree_leaves(result)]


def _same_bits(actual: Any, expected: Any) -> bool:
    """NaN equals NaN, whatever its payload."""

    def is_same(one: Any, other: Any) -> bool:
        if not isinstance(one, Tensor):
            return bool(one == other)
        one, other = _dense(one), _dense(other)
        is_nan = (one != one) & (other != other)
        return bool(((one == other) | is_nan).all())

    return _shapes(actual) == _shapes(expected) and all(map(is_same, tree_leaves(actual), tree_leaves(expected)))
