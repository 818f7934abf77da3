"""What a module takes, found by running it on tensors without memory: no accelerator, hardly any host memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from offload.estimate import ModelCost

Build = Callable[[], nn.Module]
Inputs = Callable[[], tuple[Any, ...]]


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages made inside it that are still alive, and the most there were at a time.

    Args:
        align_bytes: each storage counts as whole units of this, as allocators hand them out.
    """

    def __init__(self, align_bytes: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._align_bytes = align_bytes
        self.live_bytes = 0
        self.peak_bytes = 0
        self._seen: weakref.WeakKeyDictionary[torch.UntypedStorage, None] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.note(tensor)
        return out

    def note(self, tensor: Tensor) -> None:
        """Count the storage of ``tensor`` until it dies, unless it is counted already."""
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen[storage] = None
        num_bytes = -(-storage.nbytes() // self._align_bytes) * self._align_bytes
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._forget, num_bytes)

    def _forget(self, num_bytes: int) -> None:
        self.live_bytes -= num_bytes


def trace_module(build: Build, inputs: Inputs, *, name: str = "module", device: str = "cpu") -> ModelCost:
    """Run forward and backward of ``build()`` on ``inputs()``, without memory, and say what they take.

    The loss is the mean of everything differentiable that the module returns, or its ``loss`` where it has one. Modules
    that recompute (``torch.utils.checkpoint``) do so here too. What depends on values (``.item()``, masks by content)
    cannot run without them.

    Args:
        build: makes the module; called with ``meta`` as torch's default device, so it allocates nothing.
        inputs: makes the positional arguments of its forward; called under ``FakeTensorMode``.
        device: whose kernels are chosen among those that do the same, and so what they save for backward.

    Raises:
        ValueError: if the module cannot run so, or has no trainable parameter.
    """
    try:
        with torch.device("meta"):
            module = build()
        with FakeTensorMode():
            make_fake(module, device)
            arguments = [item.to(device) if isinstance(item, Tensor) else item for item in inputs()]
            return _trace(module, arguments, name)
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{name} cannot run on tensors without values: {error}") from error


def make_fake(module: nn.Module, device: str) -> dict[Tensor, Tensor]:
    """Replace parameters and buffers by fake ones on ``device``, and say by which; those that are tied stay so."""
    fakes: dict[Tensor, Tensor] = {}
    for owner in module.modules():
        for tensors in (owner._parameters, owner._buffers):
            for key, tensor in tensors.items():
                if tensor is None:
                    continue
                if tensor not in fakes:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    fakes[tensor] = fake
                tensors[key] = fakes[tensor]  # type: ignore[assignment]
    return fakes


def _trace(module: nn.Module, arguments: Sequence[Any], name: str) -> ModelCost:
    params = [param for param in module.parameters() if param.requires_grad]
    if not params:
        raise ValueError(f"{name} has no trainable parameter, so there is nothing to plan")
    numel, num_bytes = sum(p.numel() for p in params), sum(p.nbytes for p in params)
    live = LiveBytes()
    for tensor in (*module.parameters(), *module.buffers(), *filter(torch.is_tensor, arguments)):
        live.note(tensor)
    resting_bytes = live.live_bytes
    with live:
        loss = loss_of(module(*arguments), name)
        saved_bytes = live.live_bytes - resting_bytes
        live.peak_bytes = live.live_bytes
        torch.autograd.backward(loss)
    module.zero_grad()
    with _flops() as forward:  # a run of its own: counting holds on to what backward would free
        loss = loss_of(module(*arguments), name)
    with _flops() as backward:
        torch.autograd.backward(loss)
    beyond = live.peak_bytes - max(resting_bytes + saved_bytes, resting_bytes + num_bytes)
    return ModelCost(
        name=name,
        numel=numel,
        param_itemsize=max(1, round(num_bytes / numel)),
        num_layers=_num_layers(module),
        forward_flops=forward(),
        backward_flops=backward(),
        saved_bytes=saved_bytes,
        working_bytes=max(0, beyond),
    )


@contextmanager
def _flops() -> Iterator[Callable[[], float]]:
    counter = FlopCounterMode(display=False)
    with counter:
        yield lambda: float(counter.get_total_flops())


def loss_of(output: Any, name: str) -> Tensor:
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    leaves = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
    if not leaves:
        raise ValueError(f"what {name} returns needs no gradient, so it cannot be trained")
    return torch.stack([tensor.float().mean() for tensor in leaves]).sum()


def _num_layers(module: nn.Module) -> int:
    """Length of the longest list of submodules, which holds the layers; 1 if there is none."""
    lists = [len(child) for child in module.modules() if isinstance(child, (nn.ModuleList, nn.Sequential))]
    return max([1, *lists])
