"""What torch programs do, done on the emulated device: models, autograd, autocast, checkpointing, optimizers."""

from __future__ import annotations

import copy
import threading
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bench.small_models import DENSE_TRANSFORMERS, MODELS, TINY

EXECUTORS = ["sync", "threads", "lazy", "eager", "random"]
TRANSFORMERS = ("llama", "gpt2", "qwen_moe", "vit")  # models of that package


# All orders for one model; for the others, the one that shows what the host does not wait for.
RUNS = [("llama", executor) for executor in EXECUTORS] + [(name, "lazy") for name in MODELS if name != "llama"]


@pytest.mark.parametrize(("name", "executor"), RUNS)
def test_model_equals_cpu(sim: ModuleType, name: str, executor: str) -> None:
    if name in TRANSFORMERS:
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    case = MODELS[name](TINY)
    on_device, inputs = copy.deepcopy(case.model).to("sim"), case.inputs_on("sim")
    case.loss(copy.deepcopy(on_device), inputs).backward()  # the first time, buffers of the model are made
    expected = case.loss(case.model, case.inputs)
    expected.backward()
    sim.configure(executor)
    loss = case.loss(on_device, inputs)
    loss.backward()
    num_ops, num_host_waits = sim.counts()
    assert num_ops > 100
    assert num_host_waits == 0 or name not in DENSE_TRANSFORMERS
    assert sim.races() == []
    assert abs(loss.item() - expected.item()) < 1e-6
    for (key, param), theirs in zip(on_device.named_parameters(), case.model.parameters(), strict=True):
        assert (param.grad is None) == (theirs.grad is None)
        if theirs.grad is not None:
            torch.testing.assert_close(param.grad.cpu(), theirs.grad, rtol=1e-6, atol=1e-6, msg=key)


def test_module_to_keeps_ties(sim: ModuleType) -> None:
    """Pitfall: weights that are one parameter must stay one."""
    pytest.importorskip("transformers")
    model = MODELS["gpt2"](TINY).model.to("sim")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.weight.device.type == "sim"


class ConvNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, stride=2, groups=2, bias=False),
            nn.GroupNorm(2, 8),
            nn.ConvTranspose2d(8, 4, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.LayerNorm(4),
            nn.Linear(4, 5),
        )


def test_convolutions_equal_cpu(sim: ModuleType) -> None:
    torch.manual_seed(0)
    model, x = ConvNet(), torch.randn(2, 3, 16, 16)
    on_device, device_x = copy.deepcopy(model).to("sim"), x.to("sim")
    model(x).square().sum().backward()
    sim.configure("lazy")
    on_device(device_x).square().sum().backward()
    assert sim.counts()[1] == 0
    for expected, param in zip(model.parameters(), on_device.parameters(), strict=True):
        torch.testing.assert_close(param.grad.cpu(), expected.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(sim: ModuleType, dtype: torch.dtype) -> None:
    linear = nn.Linear(8, 8, device="sim")
    x = torch.randn(4, 8, device="sim")
    with torch.autocast("sim", dtype=dtype):
        y = linear(x)
        assert y.dtype == dtype
        assert F.mse_loss(y, x).dtype == torch.float32
        assert F.softmax(y, -1).dtype == torch.float32
        assert torch.cat([y, x]).dtype == torch.float32
    y.float().sum().backward()
    assert linear.weight.grad.dtype == torch.float32


def test_grad_scaler(sim: ModuleType) -> None:
    param = nn.Parameter(torch.ones(4, device="sim"))
    optimizer = torch.optim.SGD([param], lr=0.5)
    scaler = torch.amp.GradScaler("sim", init_scale=8.0, growth_interval=100)
    for poison, expected, scale in ((1.0, 0.5, 8.0), (float("inf"), 0.5, 4.0)):
        optimizer.zero_grad()
        scaler.scale((param * poison).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(param.detach().cpu(), torch.full((4,), expected))
        assert scaler.get_scale() == scale


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_with_dropout(sim: ModuleType, executor: str, use_reentrant: bool) -> None:
    sim.configure(executor)
    layer = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)).to("sim")
    x = torch.randn(4, 8, device="sim", requires_grad=True)
    grads = []
    for checkpointed in (False, True):
        layer.zero_grad()
        torch.manual_seed(0)
        y: Tensor = checkpoint(layer, x, use_reentrant=use_reentrant) if checkpointed else layer(x)
        y.square().sum().backward()
        grads.append([param.grad.cpu() for param in layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_saved_tensors_on_pinned_host_memory(sim: ModuleType) -> None:
    x = torch.randn(10, device="sim", requires_grad=True)
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        y = (x * x).sum()
    y.backward()
    assert torch.equal(x.grad.cpu(), 2 * x.detach().cpu())


@pytest.mark.parametrize("executor", EXECUTORS)
def test_threads_may_enqueue_and_wait(sim: ModuleType, executor: str) -> None:
    """Pitfall: whoever waits must not hold the GIL, or an operator written in Python never ends."""
    sim.configure(executor)
    results: dict[int, float] = {}

    def work(i: int) -> None:
        stream = torch.Stream("sim")
        with stream:
            x = torch.zeros(100, device="sim")
            for _ in range(20):
                x += i
                event = stream.record_event()
                event.synchronize()
            host = torch.empty(100, pin_memory=True)
            host.copy_(x, non_blocking=True)
        stream.synchronize()
        results[i] = host.mean().item()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: 20.0 * i for i in range(4)}
    assert sim.races() == []


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_optimizers_equal_cpu(sim: ModuleType, optimizer: Any, options: dict[str, bool]) -> None:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(33)) for _ in range(3)]
    on_device = [nn.Parameter(param.detach().to("sim")) for param in params]
    ours, theirs = optimizer(on_device, lr=0.1, **options), optimizer(params, lr=0.1, **options)
    for _ in range(3):
        for param, other in zip(params, on_device, strict=True):
            param.grad = torch.randn(33)
            other.grad = param.grad.to("sim")
        ours.step()
        theirs.step()
    for param, other in zip(params, on_device, strict=True):
        assert torch.equal(other.detach().cpu(), param.detach())


def test_fake_tensors_predict_memory(sim: ModuleType) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        linear = nn.Linear(1 << 15, 1 << 15, device="sim")
        y = linear(torch.empty(1 << 15, 1 << 15, device="sim"))
        assert y.device.type == "sim"
    assert torch.accelerator.memory_allocated() < 1 << 20
