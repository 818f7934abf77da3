"""Arguments, the choice of an implementation and of threads, and the ways to get at the kernels through torch."""

from __future__ import annotations

import copy
import ctypes
import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import offload.kernels
from offload.kernels import (
    AdamScalars,
    Rounding,
    State,
    adam_step,
    available_implementations,
    native,
    selection,
    threads,
    torch_reference,
)

SCALARS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "step": 1, "decoupled": True}


@pytest.mark.parametrize("name", ["master", "exp_avg", "exp_avg_sq", "grad", "param_out", "max_exp_avg_sq"])
def test_wrong_tensors_are_named(make_scalars: Any, name: str) -> None:
    names = ("master", "exp_avg", "exp_avg_sq", "grad", "param_out", "max_exp_avg_sq")

    def call(replacement: object) -> None:
        adam_step(**{**{each: torch.ones(6) for each in names}, name: replacement}, scalars=make_scalars()[0])

    with pytest.raises(TypeError, match=rf"{name} must be of torch\.float32.*float64"):
        call(torch.ones(6, dtype=torch.float64))
    with pytest.raises(TypeError, match=rf"{name} must be a torch\.Tensor, not list"):
        call([1.0] * 6)
    with pytest.raises(TypeError, match=rf"{name} must be a dense tensor.*to_dense"):
        call(torch.ones(6).to_sparse())
    with pytest.raises(ValueError, match=rf"{name} must be 1-D, not of shape \(2, 3\)"):
        call(torch.ones(2, 3))
    with pytest.raises(ValueError, match=rf"{name} must be contiguous, not of stride 2"):
        call(torch.ones(12)[::2])
    with pytest.raises(ValueError, match=r"(7|6) elements.* (6|7)"):
        call(torch.ones(7))
    with pytest.raises(ValueError, match=r"is on (meta|cpu), master on (cpu|meta)"):
        call(torch.ones(6, device="meta"))


def test_16_bit_state_is_refused(make_scalars: Any) -> None:
    with pytest.raises(TypeError, match=r"exp_avg must be of torch\.float32, not torch\.bfloat16"):
        adam_step(torch.ones(6), torch.ones(6).bfloat16(), torch.ones(6), torch.ones(6), scalars=make_scalars()[0])


def test_overlapping_tensors_are_refused_before_anything_is_written(make_scalars: Any) -> None:
    slab = torch.ones(40)
    with pytest.raises(ValueError, match="exp_avg and exp_avg_sq overlap"):
        adam_step(slab[:10], slab[10:20], slab[19:29], slab[30:], scalars=make_scalars()[0])
    assert torch.equal(slab, torch.ones(40))


@pytest.mark.parametrize(
    "change",
    [
        *({"lr": -1e-3}, {"lr": float("nan")}, {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}, {"eps": -1e-8}),
        *({"eps": float("inf")}, {"weight_decay": -0.1}, {"step": 0}),
    ],
    ids=str,
)
def test_scalars_refuse_what_torch_refuses(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be|counts from 1"):
        AdamScalars.at_step(**{**SCALARS, **change})


def test_scalars_are_hashable_and_travel_as_a_list() -> None:
    scalars = AdamScalars.at_step(**SCALARS, grad_scale=0.1)
    assert hash(scalars) == hash(AdamScalars.at_step(**SCALARS, grad_scale=0.1))
    assert AdamScalars.from_list(scalars.to_list()) == scalars
    assert all(ctypes.c_float(value).value == value for value in scalars.to_list())


def test_scalars_that_differ_in_the_sign_of_zero_are_not_the_same() -> None:
    """They give other results, so neither a cache nor a run of parameters may take one for the other."""
    plus, minus = (AdamScalars.at_step(**SCALARS, grad_scale=scale) for scale in (0.0, -0.0))
    assert plus != minus
    assert plus == copy.deepcopy(plus)
    assert len({plus, minus, copy.deepcopy(minus)}) == 2
    assert AdamScalars.at_step(**SCALARS, grad_scale=float("nan")) == AdamScalars.at_step(
        **SCALARS, grad_scale=float("nan")
    )


def test_both_zeros_scale_the_gradient_in_one_process() -> None:
    for scale in (0.0, -0.0):
        scalars = AdamScalars.at_step(**{**SCALARS, "betas": (0.0, 0.0)}, grad_scale=scale)
        for name in available_implementations():
            master, exp_avg, exp_avg_sq, grad = (torch.ones(1000) for _ in range(4))
            adam_step(master, exp_avg, exp_avg_sq, grad, scalars=scalars, implementation=name)
            assert torch.equal(exp_avg.signbit(), torch.full((1000,), math.copysign(1.0, scale) < 0)), name


def test_compiled_library_is_there() -> None:
    """The tests of bits need it; and the machine's best instruction set comes first."""
    assert "scalar" in available_implementations()
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "avx512bw" in flags and "avx512vl" in flags and "avx512dq" in flags:
        assert available_implementations()[:2] == ("avx512", "avx2")


def test_choosing_an_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OFFLOAD_KERNEL", raising=False)
    default = offload.kernels.default_implementation()
    assert default == available_implementations()[0]
    with offload.kernels.use_implementation("numba"):
        assert offload.kernels.default_implementation() == "numba"
        with offload.kernels.use_implementation("torch"):
            assert offload.kernels.default_implementation() == "torch"
        assert offload.kernels.default_implementation() == "numba"
    monkeypatch.setenv("OFFLOAD_KERNEL", "scalar")
    assert offload.kernels.default_implementation() == "scalar"
    assert offload.kernels.default_implementation("cuda") in ("triton", "torch"), "a CPU kernel can't serve CUDA"
    monkeypatch.setenv("OFFLOAD_KERNEL", "sse")
    with pytest.raises(ValueError, match=r"OFFLOAD_KERNEL: implementation 'sse' is not available.*numba"):
        offload.kernels.default_implementation()
    with pytest.raises(ValueError, match="'sse' is not available"), offload.kernels.use_implementation("sse"):
        pass


def test_implementation_of_another_device_is_refused(buffers: Any, make_scalars: Any) -> None:
    with pytest.raises(ValueError, match=r"'triton' is not available for tensors on 'cpu'.*torch"):
        buffers.ordinary(8).step(*make_scalars(), implementation="triton")


def test_the_chosen_implementation_is_the_one_that_runs(
    buffers: Any, make_scalars: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    monkeypatch.setattr(native.NativeKernel, "step", lambda _self, isa, *_arguments: used.append(isa))
    state = buffers.ordinary(8)
    for name in native.load().isas:
        state.step(*make_scalars([1]), implementation=name)
        with offload.kernels.use_implementation(name):
            state.step(*make_scalars([1]))
    assert used == [name for name in native.load().isas for _ in range(2)]


def test_number_of_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OFFLOAD_NUM_THREADS", raising=False)
    assert 1 <= offload.kernels.num_threads() <= (os.cpu_count() or 1)
    monkeypatch.setenv("OFFLOAD_NUM_THREADS", "3")
    assert offload.kernels.num_threads() == 3
    offload.kernels.set_num_threads(2)
    assert offload.kernels.num_threads() == 2
    offload.kernels.set_num_threads(None)
    monkeypatch.setenv("OFFLOAD_NUM_THREADS", "many")
    with pytest.raises(ValueError, match="OFFLOAD_NUM_THREADS must be a whole number from 1 upward, not 'many'"):
        offload.kernels.num_threads()
    with pytest.raises(ValueError, match="at least 1, not 0"):
        offload.kernels.set_num_threads(0)
    for text, processors in (("max 100000\n", None), ("150000 100000\n", 2), ("50000 100000\n", 1), ("", None)):
        (tmp_path / "cpu.max").write_text(text)
        assert threads._cgroup_processors(tmp_path / "cpu.max") == processors


def test_threads_of_a_call(buffers: Any, make_scalars: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(native.NativeKernel, "step", lambda *arguments: used.append(arguments[-1]))
    monkeypatch.setattr(threads, "MIN_PARALLEL_NUMEL", 100)
    offload.kernels.set_num_threads(5)
    try:
        for numel, wanted in ((99, None), (100, None), (100, 7), (99, 7)):
            buffers.ordinary(numel).step(*make_scalars([1]), num_threads=wanted, implementation="scalar")
    finally:
        offload.kernels.set_num_threads(None)
    assert used == [1, 5, 7, 1]
    with pytest.raises(ValueError, match="num_threads must be at least 1, not 0"):
        buffers.ordinary(8).step(*make_scalars([1]), num_threads=0)


@pytest.fixture
def fresh_load() -> Iterator[None]:
    """The library as at the first use, and again afterwards."""
    for cache in (native.load, selection._works):
        cache.cache_clear()
    yield
    for cache in (native.load, selection._works):
        cache.cache_clear()


def test_without_the_compiled_library_numba_serves_and_one_line_says_so(
    buffers: Any, make_scalars: Any, fresh_load: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = buffers.ordinary(100).step(*make_scalars(), implementation="torch")
    monkeypatch.setattr(native, "LIBRARY", Path("/nowhere/_cpu_adam.so"))
    with caplog.at_level(logging.WARNING, logger="offload.kernels"):
        buffers.ordinary(100).step(*make_scalars()).assert_same_bits(expected)
    assert len(caplog.records) == 1
    assert "C++ compiler" in caplog.text
    assert available_implementations() == ("numba", "torch")


def test_library_of_another_version_is_not_used(
    fresh_load: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "ABI_VERSION", native.ABI_VERSION + 1)
    assert native.load() is None
    assert "another version" in caplog.text


@pytest.mark.skipif("avx2" not in available_implementations(), reason="this processor has no AVX2")
def test_self_test_rejects_an_instruction_set_with_other_bits(
    fresh_load: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    honest_step = native.NativeKernel.step

    def step(self: Any, isa: str, state: Any, *arguments: Any) -> None:
        honest_step(self, isa, state, *arguments)
        if isa == "avx2":
            state.master.view(torch.int16)[7] ^= 1  # one last bit of one element

    monkeypatch.setattr(native.NativeKernel, "step", step)
    assert "avx2" not in native.load().isas
    assert "avx2 kernel gives other bits" in caplog.text
    assert "scalar" in available_implementations()


def test_importing_is_cheap() -> None:
    code = (
        "import sys, torch; from offload.kernels import native\n"
        "heavy = {'numba', 'triton', 'llvmlite'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert 'offload.kernels.op' not in sys.modules and native.load.cache_info().currsize == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_autograd_sees_the_writes(buffers: Any, make_scalars: Any) -> None:
    """A parameter that autograd saved and the update overwrites must fail in backward, not give wrong gradients."""
    state = buffers.ordinary(8, out_dtype=torch.float32)
    state.param_out = torch.nn.Parameter(torch.ones(8))
    loss = (state.param_out * torch.ones(8, requires_grad=True)).sum()
    state.step(*make_scalars([1]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_operator_is_sound(buffers: Any, make_scalars: Any) -> None:
    from offload.kernels import op

    assert op is not None
    state = buffers.ordinary(100, torch.bfloat16, torch.bfloat16, amsgrad=True)
    master, exp_avg, exp_avg_sq, grad, param_out, max_exp_avg_sq = state.tensors()
    tensors = (master, exp_avg, exp_avg_sq, max_exp_avg_sq, None, None, grad, param_out)
    arguments = ("fp32", *tensors, "adam", make_scalars()[0].to_list(), [0, 0, 0], "scalar", 1)
    torch.library.opcheck(torch.ops.offload.update_.default, arguments, test_utils=["test_schema", "test_faketensor"])


def test_nothing_is_computed_for_meta_and_fake_tensors(buffers: Any, make_scalars: Any) -> None:
    buffers.ordinary(10).map(lambda tensor: tensor.to("meta")).step(*make_scalars())
    with FakeTensorMode():
        adam_step(*(torch.empty(10) for _ in range(4)), scalars=make_scalars()[0])


@pytest.mark.parametrize("executor", ["sync", "threads", "lazy", "eager", "random"])
@pytest.mark.parametrize("implementation", [None, "scalar", "numba"])
def test_same_bits_on_the_emulated_device_without_waiting(
    sim: Any, buffers: Any, make_scalars: Any, executor: str, implementation: str | None
) -> None:
    sim.configure(executor=executor)
    start = buffers.adversarial(1000, torch.bfloat16, torch.bfloat16, amsgrad=True)
    expected = start.clone().step(*make_scalars())
    on_device = start.map(lambda tensor: tensor.to("sim"))
    torch.accelerator.synchronize()
    waiting_before = sim.counts()[1]
    on_device.step(*make_scalars(), implementation=implementation)
    assert sim.counts()[1] == waiting_before, "the update made the host wait"
    torch.accelerator.synchronize()
    on_device.map(lambda tensor: tensor.cpu()).assert_same_bits(expected)
    assert sim.races() == []


def test_torch_reference_on_the_emulated_device(sim: Any, buffers: Any, make_scalars: Any) -> None:
    """Operation by operation, as on a device that has no kernel of ours."""
    start = buffers.adversarial(1000, torch.float16, torch.float16)
    expected = start.clone().step(*make_scalars())
    on_device = start.map(lambda tensor: tensor.to("sim"))
    master, exp_avg, exp_avg_sq, grad, param_out, _ = on_device.tensors()
    for scalars in make_scalars():
        torch_reference.step(State("fp32", master, exp_avg, exp_avg_sq), grad, param_out, scalars, Rounding())
    on_device.map(lambda tensor: tensor.cpu()).assert_same_bits(expected)
