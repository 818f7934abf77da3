"""accelerate's calls, streamed: what its own tests of big models expect of a user's view."""

from __future__ import annotations

import copy
import gc
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload.compat import accelerate as compat
from tests.streaming_models import Model, build, tokens
from tests.training import assert_same_bits

pytestmark = pytest.mark.usefixtures("one_torch_thread")


class Standardize(nn.Module):
    """Weights and buffers, as a batch norm in evaluation has them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width))
        self.register_buffer("running_mean", torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.running_mean) * self.weight


class ForTest(nn.Module):
    """No repeated blocks: a linear layer, a norm with a buffer, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1 = nn.Linear(3, 4)
        self.norm = Standardize(4)
        self.linear2 = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.norm(self.linear1(x)))


@pytest.mark.parametrize("name", ["cpu_offload", "disk_offload", "dispatch_model"])
def test_signatures_are_accelerates(name: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    theirs, ours = (inspect.signature(getattr(module, name)) for module in (accelerate, compat))
    assert [*ours.parameters] == [*theirs.parameters]
    assert [p.default for p in ours.parameters.values()] == [p.default for p in theirs.parameters.values()]


CALLS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "cpu": lambda model, path: compat.cpu_offload(model, torch.device("sim")),
    "disk": lambda model, path: compat.disk_offload(model, path, "sim"),
    "map": lambda model, path: compat.dispatch_model(
        model, {"linear1": "cpu", "norm": "cpu", "linear2": 0}, offload_dir=path
    ),
    "map to both": lambda model, path: compat.dispatch_model(
        model, {"linear1": "disk", "norm": "cpu", "linear2": "cpu"}, offload_dir=path
    ),
    "map to disk": lambda model, path: compat.dispatch_model(
        model, {"linear1": "disk", "norm": 0, "linear2": "disk"}, offload_dir=path
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_outputs_are_the_same_and_where_the_inputs_are(sim: ModuleType, call: str, tmp_path: Path) -> None:
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    want = build(ForTest).eval()(x)
    model = build(ForTest).eval()
    assert CALLS[call](model, tmp_path) is model
    for _ in range(2):
        assert_same_bits(model(x), want)
        assert_same_bits(model(x.to("sim")), want)
    assert model(x).device.type == "cpu"
    assert model.norm.running_mean.device.type == "sim"
    compat.remove_hook_from_submodules(model)
    assert_same_bits(model(x), want)
    with pytest.raises(ValueError, match="was not offloaded"):
        compat.remove(model)
    compat.remove_hook_from_submodules(model)
    assert_same_bits(model(x), want)
    assert sim.races() == []


def test_only_what_the_map_puts_on_disk_is_written(sim: ModuleType, tmp_path: Path) -> None:
    CALLS["map to both"](build(ForTest).eval(), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["linear1.safetensors"]


def test_blocks_are_streamed_as_one(sim: ModuleType) -> None:
    model = build()
    compat.cpu_offload(model, preload_module_classes=["Embedding"])
    assert all(p.device.type == "cpu" for p in model.parameters())
    assert_same_bits(model(tokens()), build()(tokens()))


def test_nothing_outlives_the_model(sim: ModuleType) -> None:
    model = build()
    compat.cpu_offload(model)
    model(tokens())
    del model
    gc.collect()
    assert torch.accelerator.memory_allocated() == 0


# ---- what accelerate's tests/test_big_modeling.py asks for, in our words


class ReadsWeightOfChild(nn.Module):
    """Never calls the module whose weight it uses, so that only the parent's call can bring it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.linear.weight.t() + self.linear.bias


class WithUnusedModules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = ReadsWeightOfChild()
        self.second = ReadsWeightOfChild()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_modules_that_are_not_called_come_with_those_named_to_be_loaded_whole(
    sim: ModuleType, where: str, tmp_path: Path
) -> None:
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    model = build(WithUnusedModules)
    compat.dispatch_model(
        model, {"": where}, 0, offload_dir=tmp_path, offload_buffers=True, preload_module_classes=["ReadsWeightOfChild"]
    )
    assert_same_bits(model(x), build(WithUnusedModules)(x))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(256, 256, bias=False)
        self.second = nn.Linear(256, 256, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("shift", torch.ones(256), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))) + self.shift


class TwoTied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Tied(), Tied()

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


def test_weights_tied_inside_offloaded_modules_are_on_the_device_once(sim: ModuleType) -> None:
    model = build(TwoTied)
    x = torch.randn(1, 256, generator=torch.Generator().manual_seed(0))
    compat.dispatch_model(model, {"a": 0, "b": "cpu"}, preload_module_classes=["Tied"])
    torch.accelerator.reset_peak_memory_stats()
    for _ in range(2):
        assert_same_bits(model(x), build(TwoTied)(x))
    assert torch.accelerator.max_memory_allocated() < 2.1 * 256 * 256 * 4
    assert model.b.first.weight is model.b.second.weight


def test_weights_loaded_by_accelerate_are_dispatched(
    sim: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loader with our function: there, offloaded weights go to the meta device; here they keep their values."""
    accelerate = pytest.importorskip("accelerate")
    monkeypatch.setattr(accelerate.big_modeling, "dispatch_model", compat.dispatch_model)
    torch.save(build(ForTest).state_dict(), tmp_path / "weights.bin")
    model = build(ForTest, seed=1).eval()
    device_map = {"linear1": "cpu", "norm": "cpu", "linear2": 0}
    accelerate.load_checkpoint_and_dispatch(model, str(tmp_path / "weights.bin"), device_map=device_map)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    assert model.linear1.weight.device.type == "cpu"
    assert_same_bits(model(x), build(ForTest).eval()(x))


def test_moving_and_copying_are_refused_and_buffers_stay(sim: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    model = compat.cpu_offload(build(ForTest), offload_buffers=True)
    assert "buffers stay on the device" in caplog.text
    with pytest.raises(RuntimeError, match=r"call remove\(\)"):
        model.to("sim")
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(model)


def test_a_map_without_offloading_moves_the_model(sim: ModuleType) -> None:
    model = compat.dispatch_model(build(ForTest), {"": 0})
    assert all(p.device.type == "sim" for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device_map": {"": "cpu"}, "state_dict": {}}, "state_dict is not available"),
        ({"device_map": {"layers": 0, "": 1}}, "one accelerator"),
        ({"device_map": {"": "disk"}}, "offload_dir"),
        ({"device_map": {"layers": "cpu"}}, "says nothing about 'embedding'"),
    ],
)
def test_what_is_refused(sim: ModuleType, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compat.dispatch_model(Model(), **arguments)
