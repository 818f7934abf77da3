"""Training through a model that streams: gradients, updates and recomputation with the bits of the model unstreamed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import offload
from offload.lanes import Work
from offload.streaming.blocks import NamedTensor
from offload.streaming.gradients import StreamedGradients
from offload.streaming.packing import PackedLayer, Packing
from tests.streaming_models import VOCAB, Block, Model, build, tokens
from tests.test_streaming import BASE_BYTES, BLOCK_BYTES, EXECUTORS, SMALL, add_adapters, limit_host_memory, streamed
from tests.training import assert_same_bits, snapshot

pytestmark = pytest.mark.usefixtures("one_torch_thread", "poison")

HYPER: dict[str, Any] = {"lr": 3e-3, "weight_decay": 0.05}


def loss_of(model: nn.Module, step: int, device: str = "sim") -> Tensor:
    batch = tokens(seed=step).to(device)
    return nn.functional.cross_entropy(model(batch).flatten(0, 1), batch.flatten())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.cpu().clone() for name, p in model.named_parameters() if p.grad is not None}


def reference_gradients(make: Callable[[], nn.Module] = Model, num_backwards: int = 1) -> dict[str, Tensor]:
    model = build(make).to("sim")
    for step in range(num_backwards):
        loss_of(model, step).backward()
    return gradients(model)


def train(model: nn.Module, optimizers: list[torch.optim.Optimizer], num_steps: int) -> dict[str, Tensor]:
    for step in range(num_steps):
        loss_of(model, step).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.accelerator.synchronize()
    return snapshot(model)


def optimizers_of(handle: offload.StreamHandle) -> list[torch.optim.Optimizer]:
    groups = (handle.host_parameters(), handle.device_parameters())
    return [offload.AdamW(params, plan="host", **HYPER) for params in groups]


def reference_training(make: Callable[[], nn.Module], num_steps: int) -> dict[str, Tensor]:
    model = build(make).to("sim")
    trainable = [p for p in model.parameters() if p.requires_grad]
    return train(model, [offload.AdamW(trainable, plan="host", **HYPER)], num_steps)


# ---- gradients


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("window", [1, 2, 3])
def test_gradients_have_the_same_bits(sim: ModuleType, poison: list[int], executor: str, window: int) -> None:
    sim.configure(executor)
    model = build()
    streamed(model, BASE_BYTES + 3 * BLOCK_BYTES, window=window)
    loss_of(model, 0).backward()
    assert model.layers[0].up.weight.grad.device.type == "cpu"
    assert_same_bits(gradients(model), reference_gradients())
    assert poison[0] > 0


def test_the_last_window_of_forward_is_the_first_of_backward(sim: ModuleType) -> None:
    sim.set_profile(h2d_bytes_per_s=1e6, latency_s=0.0)
    model = build()
    streamed(model)
    batch = tokens().to("sim")
    sim.configure("sync")
    model(batch).sum().backward()
    uploads = [span for span in sim.trace() if span.engine == "h2d"]
    assert [round((span.end_s - span.start_s) * 1e6) for span in uploads] == [BLOCK_BYTES] * (8 + 8 - 2)


class WatchedLane:
    """Runs work at once, and notes whose events somebody waits for."""

    def __init__(self) -> None:
        self.num_submitted = 0
        self.waited: list[int] = []

    def submit(self, work: Work, after: Any = ()) -> Any:
        work.run()
        self.num_submitted += 1
        return SimpleNamespace(synchronize=partial(self.waited.append, self.num_submitted - 1))

    def mark(self) -> Any:
        return SimpleNamespace(synchronize=lambda: None)


def test_gradients_of_two_layers_at_most_are_on_their_way() -> None:
    """Else a host that is ahead of its device would hold the gradients of all layers there."""
    weights = [nn.Parameter(torch.ones(128)) for _ in range(6)]
    layers = []
    for weight in weights:
        named = [NamedTensor("weight", weight)]
        packing = Packing(named)
        layers.append(PackedLayer.in_memory(named, packing, torch.empty(packing.num_bytes, dtype=torch.uint8), False))
    lane = WatchedLane()
    lanes: Any = SimpleNamespace(compute=lane, d2h=lane, h2d=lane)
    gradients = StreamedGradients(layers, lanes, lambda num: torch.empty(num, dtype=torch.uint8), lambda: None)
    sum((weight * 2).sum() for weight in weights).backward()
    assert lane.waited == [0, 1, 2, 3], "of six, all but the last two"
    assert gradients.end_backward()
    assert all(torch.equal(weight.grad, torch.full((128,), 2.0)) for weight in weights)


def test_host_memory_that_does_not_hold_the_gradients_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    handle = streamed(model)
    host_bytes = handle.bill.host_bytes
    with monkeypatch.context() as patch:
        limit_host_memory(patch, 8 * BLOCK_BYTES - 1)
        with pytest.raises(
            offload.BudgetError, match=rf"gradients of streamed weights need .*\({8 * BLOCK_BYTES} bytes"
        ):
            loss_of(model, 0)
    assert handle.bill.host_bytes == host_bytes
    loss_of(model, 0).backward()
    assert_same_bits(gradients(model), reference_gradients())


@pytest.mark.parametrize("executor", EXECUTORS)
def test_gradients_accumulate(sim: ModuleType, executor: str) -> None:
    sim.configure(executor)
    model = build()
    streamed(model, SMALL + BLOCK_BYTES)
    for step in range(3):
        loss_of(model, step).backward()
    assert_same_bits(gradients(model), reference_gradients(num_backwards=3))
    model.zero_grad()
    loss_of(model, 0).backward()
    assert_same_bits(gradients(model), reference_gradients())


class Twice(Model):
    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for i in (0, 1, 2, 1, 3, 4, 5, 6, 7, 0):
            x = self.layers[i](x)
        return self.head(x)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_gradients_of_a_block_called_twice(sim: ModuleType, executor: str) -> None:
    sim.configure(executor)
    model = build(Twice)
    streamed(model)
    loss_of(model, 0).backward()
    assert_same_bits(gradients(model), reference_gradients(Twice))


class Checkpointed(Model):
    reentrant = False

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return self.head(x)


class Reentrant(Checkpointed):
    reentrant = True


class Segments(Model):
    """Recomputes three blocks at a time, so that they are needed together and do not fit."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(checkpoint_sequential(list(self.layers), 3, x, use_reentrant=False))


class SavedOnCpu(Model):
    def forward(self, tokens: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return super().forward(tokens)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("make", [Checkpointed, Reentrant, Segments, SavedOnCpu])
def test_recomputation_and_other_saved_tensor_hooks(sim: ModuleType, executor: str, make: type[Model]) -> None:
    sim.configure(executor)
    model = build(make)
    streamed(model)
    loss_of(model, 0).backward()
    assert_same_bits(gradients(model), reference_gradients(make))


def test_checkpointing_saves_memory_while_streaming(sim: ModuleType) -> None:
    peaks = []
    for make in (Model, Checkpointed):
        model = build(make)
        handle = streamed(model)
        torch.accelerator.reset_peak_memory_stats()
        base = torch.accelerator.memory_allocated()
        batch = torch.randint(VOCAB, (4, 200)).to("sim")
        model(batch).sum().backward()
        peaks.append(torch.accelerator.max_memory_allocated() - base)
        handle.remove()
    assert peaks[1] < 0.6 * peaks[0]


def test_an_exception_in_the_middle_of_backward_and_a_retry() -> None:
    model = build()
    streamed(model)

    def fail(grad: Tensor) -> Tensor:
        raise ValueError("no")

    handle = model.layers[3].register_full_backward_hook(lambda module, inputs, outputs: fail(outputs[0]))
    with pytest.raises(ValueError, match="no"):
        loss_of(model, 0).backward()
    handle.remove()
    model.zero_grad()
    loss_of(model, 0).backward()
    assert_same_bits(gradients(model), reference_gradients())


def test_a_graph_kept_for_a_second_backward() -> None:
    model = build()
    streamed(model)
    loss = loss_of(model, 0)
    loss.backward(retain_graph=True)
    first = gradients(model)
    model.zero_grad()
    loss.backward()
    assert_same_bits(gradients(model), first)


def test_what_a_graph_saved_may_be_looked_at() -> None:
    model = build()
    streamed(model)
    loss = loss_of(model, 0)
    node, seen = loss.grad_fn, []
    while node is not None:
        if hasattr(node, "_saved_mat2"):
            seen.append(node._saved_mat2)
        node = next((n for n, _ in node.next_functions if n is not None and "Accumulate" not in type(n).__name__), None)
    assert seen
    assert not any(tensor.isnan().any().item() for tensor in seen)


class ChangesInPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        kept = torch.tanh(self.up(self.norm(x)))
        out = self.down(kept)
        with torch.no_grad():
            kept.mul_(2)
        return out


def test_saved_activations_that_are_changed_are_still_found() -> None:
    model = build(lambda: Model(make=lambda i: ChangesInPlace()))
    streamed(model)
    with pytest.raises(RuntimeError, match="changed in place since forward"):
        loss_of(model, 0).backward()


# ---- whole trainings


@pytest.mark.parametrize("executor", EXECUTORS)
def test_full_training_has_the_same_bits(sim: ModuleType, executor: str) -> None:
    sim.configure(executor)
    want = reference_training(Model, 5)
    sim.configure(executor)
    model = build()
    handle = streamed(model, SMALL + BLOCK_BYTES)
    assert_same_bits(train(model, optimizers_of(handle), 5), want)


def test_torchs_optimizers_train_weights_in_host_memory() -> None:
    def train_with(model: nn.Module) -> dict[str, Tensor]:
        return train(model, [torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)], 3)

    model = build()
    streamed(model)
    assert_same_bits(train_with(model), train_with(build().to("sim")))


def adapted() -> nn.Module:
    model = Model()
    model.requires_grad_(False)
    add_adapters(model)
    for layer in (*model.layers, model):
        adapter = layer.up if isinstance(layer, Block) else layer.head
        adapter.base.requires_grad_(False)
    return model


@pytest.mark.parametrize("executor", EXECUTORS)
def test_adapters_on_a_frozen_base_train_on_the_device(sim: ModuleType, executor: str) -> None:
    sim.configure(executor)
    want = reference_training(adapted, 4)
    sim.configure(executor)
    model = build(adapted)
    handle = streamed(model, 70_000)
    assert not any(p.requires_grad for p in handle.host_parameters())
    trainable = [p for p in handle.device_parameters() if p.requires_grad]
    assert_same_bits(train(model, [offload.AdamW(trainable, plan="host", **HYPER)], 4), want)


def test_evaluation_between_steps() -> None:
    want = reference_training(Model, 3)
    model = build()
    handle = streamed(model)
    optimizers = optimizers_of(handle)
    for step in range(3):
        loss_of(model, step).backward()
        with torch.no_grad():
            loss_of(model, 7)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            loss_of(model, 8)
    assert_same_bits(snapshot(model), want)


def test_weights_unfrozen_later_get_gradients() -> None:
    def partly_frozen() -> nn.Module:
        model = Model()
        for layer in model.layers[:4]:
            layer.requires_grad_(False)
        return model

    model = build(partly_frozen)
    streamed(model)
    loss_of(model, 0).backward()
    assert_same_bits(gradients(model), reference_gradients(partly_frozen))
    model.zero_grad()
    model.requires_grad_(True)
    loss_of(model, 0).backward()
    assert_same_bits(gradients(model), reference_gradients())


def test_graphs_and_handles_are_freed() -> None:
    """Also a graph whose backward never ran, and without remove()."""
    model = build()
    handle = streamed(model)
    loss_of(model, 0).backward()
    loss = loss_of(model, 1)
    del model, handle, loss
    gc.collect()
    assert torch.accelerator.memory_allocated() == 0


def test_updates_behind_autograds_back_are_seen() -> None:
    """Optimizers may write through ``param.data``, which counts no version: no copy outlives a backward."""

    def descend(model: nn.Module) -> dict[str, Tensor]:
        for step in range(3):
            loss_of(model, step).backward()
            for param in model.parameters():
                param.data.sub_(param.grad * 0.1)
                param.grad = None
        return snapshot(model)

    model = build()
    streamed(model, BASE_BYTES + 4 * BLOCK_BYTES, window=4, evict_batch=4)  # so that finished layers linger
    assert_same_bits(descend(model), descend(build().to("sim")))
