"""Quantised weights as libraries keep them, in several tensors: streamed as plain bytes, with the bits of the model
unstreamed; or refused before anything is moved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
from offload.streaming import quantised
from tests.streaming_models import WIDTH, Model, build, tokens
from tests.test_streaming import EXECUTORS, add_adapters, outputs, streamed
from tests.test_streaming_training import gradients, loss_of
from tests.training import assert_same_bits

pytestmark = pytest.mark.usefixtures("one_torch_thread", "poison")


class Int4(Tensor):
    """Two 4-bit numbers a byte, and a scale for each group of eight: as torchao's subclasses are made."""

    packed: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, packed: Tensor, scale: Tensor) -> Int4:
        shape = (packed.shape[0], 2 * packed.shape[1])
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=scale.dtype, device=packed.device)
        made.packed, made.scale = packed, scale
        return made

    @classmethod
    def quantise(cls, weight: Tensor) -> Int4:
        groups = weight.unflatten(1, (-1, 8))
        scale = groups.abs().amax(-1) / 7
        whole = (groups / scale[..., None]).round().add(8).to(torch.uint8).flatten(1)
        return cls(whole[:, ::2] * 16 + whole[:, 1::2], scale)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["packed", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], context: None, size: Any, stride: Any) -> Int4:
        return cls(inner["packed"], inner["scale"])

    def dequantise(self) -> Tensor:
        whole = torch.stack([self.packed // 16, self.packed % 16], -1).flatten(1).to(self.scale.dtype) - 8
        return (whole.unflatten(1, (-1, 8)) * self.scale[..., None]).flatten(1)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            x, weight, bias = args
            return nn.functional.linear(x, weight.dequantise(), bias)
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (torch.ops.aten.detach.default, torch.ops.aten._to_copy.default):
            raise NotImplementedError(func)
        self = args[0]
        return cls(func(self.packed, **(kwargs or {})), func(self.scale, **(kwargs or {})))


def quantise(model: nn.Module) -> nn.Module:
    for layer in model.layers:
        for linear in (layer.up, layer.down):
            linear.weight = nn.Parameter(Int4.quantise(linear.weight.detach()), requires_grad=False)
    return model


def make() -> nn.Module:
    return quantise(Model()).requires_grad_(False)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_the_same_bits(sim: ModuleType, poison: list[int], executor: str) -> None:
    sim.configure(executor)
    model = build(make)
    handle = streamed(model, "30KiB", resident=["layers.3"])
    assert handle.plan.resident == (3,)
    assert handle.plan.block_bytes[0] < 2 * WIDTH * 2 * WIDTH * 4 // 3, "an eighth of the weights, and their scales"
    assert_same_bits(outputs(model), outputs(build(make), "cpu"))
    assert poison[0] > 0, "places were given away"
    up = model.layers[0].up.weight
    assert up.packed.device.type == up.scale.device.type == "cpu"
    assert any(param is up for param in handle.host_parameters())
    assert not any(param is up for param in handle.device_parameters())
    handle.remove()
    assert_same_bits(outputs(model, "cpu"), outputs(build(make), "cpu"))


CODE = torch.linspace(-1, 1, 16)


class FourBit(nn.Module):
    """A linear layer whose weight holds its scales as bitsandbytes does, quantised in their turn."""

    def __init__(self, linear: nn.Linear, code: Tensor) -> None:
        super().__init__()
        whole = Int4.quantise(linear.weight.detach())
        self.shape = linear.weight.shape
        scales = SimpleNamespace(absmax=whole.scale.amax(0), code=torch.arange(256.0), offset=None, state2=None)
        absmax = (whole.scale / scales.absmax * 255).round().to(torch.uint8)
        self.weight = nn.Parameter(whole.packed, requires_grad=False)
        self.weight.quant_state = SimpleNamespace(absmax=absmax, code=code, offset=torch.tensor(0.5), state2=scales)

    def forward(self, x: Tensor) -> Tensor:
        state, scales = self.weight.quant_state, self.weight.quant_state.state2
        scale = scales.code[state.absmax.long()] * scales.absmax + state.offset
        whole = state.code[torch.stack([self.weight // 16, self.weight % 16], -1).flatten(1).long()]
        return nn.functional.linear(x, (whole.unflatten(1, (-1, 8)) * scale[..., None]).flatten(1))


def four_bit() -> nn.Module:
    model, code = Model().requires_grad_(False), CODE.clone()  # one table for all layers
    for layer in model.layers:
        layer.up, layer.down = FourBit(layer.up, code), FourBit(layer.down, code)
    return model


def test_scales_beside_a_parameter_come_with_it(poison: list[int]) -> None:
    model = build(four_bit)
    streamed(model, "30KiB", resident=0)
    assert_same_bits(outputs(model), outputs(build(four_bit), "cpu"))
    assert poison[0] > 0, "places were given away"
    state = model.layers[0].up.weight.quant_state
    assert state.absmax.device.type == state.state2.absmax.device.type == state.offset.device.type == "cpu"
    assert state.code.device.type == "sim", "shared by all blocks"


def test_weights_on_disk_and_changes_that_are_seen(tmp_path: Path) -> None:
    model, other = build(make), build(make, seed=1)
    streamed(model, "30KiB", resident=0, disk=tmp_path)
    assert_same_bits(outputs(model), outputs(build(make), "cpu"))
    with torch.no_grad():
        for mine, theirs in zip(model.layers, other.layers, strict=True):
            for name in ("packed", "scale"):
                getattr(mine.up.weight, name).copy_(getattr(theirs.up.weight, name))
    reference = build(make)
    for mine, theirs in zip(reference.layers, other.layers, strict=True):
        mine.up.weight = theirs.up.weight
    assert_same_bits(outputs(model), outputs(reference, "cpu"))


def test_adapters_on_quantised_weights_are_trained() -> None:
    def adapted() -> nn.Module:
        model = make()
        add_adapters(model)
        return model

    reference = build(adapted)
    loss_of(reference, 0, "cpu").backward()
    model = build(adapted)
    streamed(model, "80KiB", resident=0)
    loss_of(model, 0).backward()
    assert_same_bits(gradients(model), gradients(reference))


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:  # as DTensors are, whose parts are no weights
        patch.setattr(quantised, "is_sharded", lambda tensor: isinstance(tensor, Int4))
        with pytest.raises(TypeError, match=r"layers\.0\.up\.weight is a Int4 with layout"):
            streamed(build(make), "1MiB")
    trained = build(make)
    trained.layers[2].up.weight.requires_grad_(True)
    with pytest.raises(TypeError, match=r"layers\.2\.up\.weight is a Int4, made of several tensors, and is trained"):
        streamed(trained, "1MiB")
    with pytest.raises(ValueError, match=r"layers\.0\.up\.weight is quantised, .* give reserve=bytes"):
        offload.stream(build(make), "1MiB", example=(tokens(),), verbose=False)
    eight_bit = build()
    eight_bit.layers[4].up.weight.SCB = torch.ones(2 * WIDTH)
    with pytest.raises(TypeError, match=r"layers\.4\.up\.weight is a Parameter of bitsandbytes' 8-bit layers"):
        streamed(eight_bit, "1MiB")
    sparse = build()
    sparse.layers[1].up.weight = nn.Parameter(sparse.layers[1].up.weight.detach().to_sparse())
    with pytest.raises(TypeError, match=r"layers\.1\.up\.weight is a Parameter with layout torch\.sparse_coo"):
        streamed(sparse, "1MiB")


# ---- as libraries make them; run with ``pip install torchao bitsandbytes``


def by_torchao(config: str, **kwargs: Any) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        quantization = pytest.importorskip("torchao.quantization")
        model = Model().requires_grad_(False)
        quantization.quantize_(model.layers, getattr(quantization, config)(**kwargs))
        return model

    return made


def by_bitsandbytes(*, nested: bool) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        bnb = pytest.importorskip("bitsandbytes")

        def four_bit(linear: nn.Linear) -> nn.Module:
            size = linear.in_features, linear.out_features
            new = bnb.nn.Linear4bit(
                *size, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=nested, device="meta"
            )
            new.weight = bnb.nn.Params4bit(
                linear.weight.detach(), requires_grad=False, quant_type="nf4", compress_statistics=nested, module=new
            )
            new.bias = linear.bias
            return new.to("cpu")

        model = Model().requires_grad_(False)
        for layer in model.layers:
            layer.up, layer.down = four_bit(layer.up), four_bit(layer.down)
        return model

    return made


LIBRARIES = {
    "torchao int8": by_torchao("Int8WeightOnlyConfig"),
    "torchao int4 in bytes": by_torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),
    "torchao int8, activations too": by_torchao("Int8DynamicActivationInt8WeightConfig"),
    "bitsandbytes nf4": by_bitsandbytes(nested=False),
    "bitsandbytes nf4, scales quantised": by_bitsandbytes(nested=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
def test_weights_that_a_library_quantised(library: str, poison: list[int], tmp_path: Path) -> None:
    made = LIBRARIES[library]
    for disk in ({}, {"disk": tmp_path}):
        model = build(made)
        want = outputs(build(made).to("sim"))
        handle = streamed(model, "60KiB", resident=["layers.3"], **disk)
        assert all(num_bytes < 3 * 4 * WIDTH * WIDTH for num_bytes in handle.plan.block_bytes)
        assert_same_bits(outputs(model), want)
        assert poison[0] > 0, "places were given away"
        handle.remove()
