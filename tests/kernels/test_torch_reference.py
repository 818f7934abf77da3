"""The reference against the C library's fmaf, against torch's fused optimizers, and against float64."""

from __future__ import annotations

import ctypes
import ctypes.util
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload.kernels import AdamScalars, adam_step, available_implementations
from offload.kernels.torch_reference import fma

_fmaf = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
_fmaf.argtypes, _fmaf.restype = [ctypes.c_float] * 3, ctypes.c_float


def exact_fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return torch.tensor([_fmaf(*abc) for abc in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)])


def assert_equal_bits(ours: Tensor, theirs: Tensor) -> None:
    same = (ours.view(torch.int32) == theirs.view(torch.int32)) | (ours.isnan() & theirs.isnan())
    assert bool(same.all()), f"{int((~same).sum())} differ, first at {int((~same).nonzero()[0])}"


def halfway_cases(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Products a little off a rounding boundary of the sum: rounding twice, by way of float64, goes wrong here."""
    generator = torch.Generator().manual_seed(0)
    sign = torch.randint(2, (count,), generator=generator) * 2.0 - 1
    c = 1 + torch.randint(2**23, (count,), generator=generator) * 2.0**-23  # in [1, 2): half a unit is 2**-24
    k = torch.randint(1, 2**11, (count,), generator=generator).float()
    a, b = 2.0**-12 * (1 + k * 2.0**-23), 2.0**-12 * (1 - k * 2.0**-23)  # a * b = 2**-24 * (1 - k**2 * 2**-46)
    scale = 2.0 ** torch.randint(-100, 100, (count,), generator=generator)
    return a * scale, b * sign, c * scale


def test_fma_rounds_once_near_halfway() -> None:
    a, b, c = halfway_cases(20_000)
    expected = exact_fma(a, b, c)
    assert_equal_bits(fma(a, b, c), expected)
    twice = (a.double() * b.double() + c.double()).float()
    assert not torch.equal(twice, expected), "these cases don't tell one rounding from two"


def test_fma_of_special_values() -> None:
    tiny, huge = 2.0**-149, 3.4028234663852886e38
    values = [0.0, 1.0, tiny, 3 * tiny, 2.0**-126, 2.0**-75, 1 / 3, 2.0**64, huge, huge / 2, math.inf, math.nan]
    both = torch.tensor([sign * value for value in values for sign in (1, -1)])
    a, b, c = (each.reshape(-1).contiguous() for each in torch.meshgrid(both, both, both, indexing="ij"))
    assert_equal_bits(fma(a, b, c), exact_fma(a, b, c))


@settings(max_examples=500, deadline=None)
@given(*[st.floats(width=32)] * 3)
def test_fma_of_any_values(a: float, b: float, c: float) -> None:
    operands = [torch.tensor([value]) for value in (a, b, c)]
    assert_equal_bits(fma(*operands), exact_fma(*operands))


FUSED = {True: torch._fused_adamw_, False: torch._fused_adam_}

needs_fma = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="without FMA instructions torch's own fused kernels give other bits",
)


def torch_fused(state: Any, step: int, options: dict[str, Any], grad: Tensor | None = None) -> None:
    """One step of torch's kernel, which contracts the arithmetic of the last numel % 16 elements otherwise: no rest."""
    assert state.master.numel() % 16 == 0
    FUSED[options["decoupled"]](
        [state.master],
        [state.grad if grad is None else grad],
        [state.exp_avg],
        [state.exp_avg_sq],
        [] if state.max_exp_avg_sq is None else [state.max_exp_avg_sq],
        [torch.tensor(float(step))],
        lr=options["lr"],
        beta1=options["betas"][0],
        beta2=options["betas"][1],
        weight_decay=options["weight_decay"],
        eps=options["eps"],
        amsgrad=state.max_exp_avg_sq is not None,
        maximize=options["maximize"],
    )


@needs_fma
@pytest.mark.parametrize("decoupled", [True, False], ids=["adamw", "adam"])
@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("maximize", [False, True], ids=["", "maximize"])
@pytest.mark.parametrize(("betas", "weight_decay"), [((0.9, 0.999), 0.1), ((0.4, 0.9), 0.0), ((0.0, 0.5), 0.3)])
def test_fifty_steps_of_torch_fused(
    buffers: Any, decoupled: bool, amsgrad: bool, maximize: bool, betas: tuple[float, float], weight_decay: float
) -> None:
    options = {"lr": 1e-3, "betas": betas, "eps": 1e-8, "weight_decay": weight_decay}
    options |= {"decoupled": decoupled, "maximize": maximize}
    theirs = buffers.adversarial(16 * 300, amsgrad=amsgrad)
    ours = {name: theirs.clone() for name in available_implementations() if name != "scalar"}
    for step in range(1, 51):
        torch_fused(theirs, step, options)
        for name, state in ours.items():
            state.step(AdamScalars.at_step(step=step, **options), implementation=name)
    for name, state in ours.items():
        state.assert_same_bits(theirs, name)


@needs_fma
def test_unscaling_widening_and_copying_as_three_passes_of_torch(buffers: Any, formats: Any) -> None:
    """So a host without any kernel of ours could use torch's own operations."""
    grad_dtype, out_dtype = formats
    options = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "decoupled": True}
    ours = buffers.adversarial(16 * 300, grad_dtype, out_dtype)
    theirs = ours.clone()
    for step in range(1, 11):
        torch_fused(theirs, step, {**options, "maximize": False}, theirs.grad.float() * 0.37)
        if theirs.param_out is not None:
            theirs.param_out.copy_(theirs.master)
        ours.step(AdamScalars.at_step(step=step, grad_scale=0.37, **options))
    ours.assert_same_bits(theirs)


@needs_fma
@pytest.mark.parametrize("optimizer_type", [torch.optim.AdamW, torch.optim.Adam])
def test_torch_optim_with_gradients_that_change(optimizer_type: Any) -> None:
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(16 * 500))
    master, exp_avg, exp_avg_sq = param.detach().clone(), torch.zeros(16 * 500), torch.zeros(16 * 500)
    options: dict[str, Any] = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.05}
    optimizer = optimizer_type([param], fused=True, **options)
    for step in range(1, 51):
        param.grad = torch.randn(16 * 500) * 0.1
        optimizer.step()
        scalars = AdamScalars.at_step(step=step, decoupled=optimizer_type is torch.optim.AdamW, **options)
        adam_step(master, exp_avg, exp_avg_sq, param.grad, scalars=scalars)
    assert torch.equal(master, param)
    assert torch.equal(exp_avg, optimizer.state[param]["exp_avg"])
    assert torch.equal(exp_avg_sq, optimizer.state[param]["exp_avg_sq"])


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring numbers of a dtype around float64 values."""
    info = torch.finfo(dtype)
    exponent = values.abs().clamp(min=info.smallest_normal).log2().floor()
    return info.eps * 2.0**exponent


def float64_step(state: Any, options: dict[str, Any], step: int) -> dict[str, Tensor]:
    """Adam as its paper writes it (arXiv 1412.6980; decoupled decay: 1711.05101), nothing rounded on the way.

    The values named ``_size`` are the same sums with every term taken positive: what rounding errors scale with.
    """
    beta1, beta2 = options["betas"]
    p, m, v, g = (each.double() for each in (state.master, state.exp_avg, state.exp_avg_sq, state.grad))
    g = g * options["grad_scale"]
    g_size = g.abs()
    if options["decoupled"]:
        p = p * (1 - options["lr"] * options["weight_decay"])
    else:
        g, g_size = g + options["weight_decay"] * p, g_size + options["weight_decay"] * p.abs()
    m_size = torch.stack([m.abs(), g_size]).amax(0)
    m, v_size = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g_size**2
    v = beta2 * v + (1 - beta2) * g**2
    factor = options["lr"] / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + options["eps"])
    change = factor * m
    sizes = {"exp_avg_size": m_size, "exp_avg_sq_size": v_size, "change_size": factor * m_size}
    return {"exp_avg": m, "exp_avg_sq": v, "master": p - change, **sizes}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decoupled", [True, False], ids=["adamw", "adam"])
def test_error_of_one_step_against_float64(buffers: Any, dtype: torch.dtype, decoupled: bool) -> None:
    """The bounds that docs/numerics.md states, for gradients and copies of each dtype, from the same fp32 state.

    - exp_avg: 2 ulp of the larger of |exp_avg| and |grad|;
    - exp_avg_sq: 5 ulp of its size;
    - master: 2 ulp of the larger of |master| before and after, and 12 ulp of the change;
    - param_out: half an ulp of its dtype more.
    """
    options = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "grad_scale": 0.37}
    options["decoupled"] = decoupled
    for seed, step in enumerate((1, 10, 1000, 100_000)):
        state = buffers.ordinary(20_000, dtype, dtype, seed=seed)
        exact = float64_step(state, options, step)
        largest_p = torch.maximum(state.master.double().abs(), exact["master"].abs())
        state.step(AdamScalars.at_step(step=step, **options))
        p_bound = 2 * ulp(largest_p, torch.float32) + 12 * ulp(exact["change_size"], torch.float32)
        bounds = {
            "exp_avg": (state.exp_avg, exact["exp_avg"], 2 * ulp(exact["exp_avg_size"], torch.float32)),
            "exp_avg_sq": (state.exp_avg_sq, exact["exp_avg_sq"], 5 * ulp(exact["exp_avg_sq_size"], torch.float32)),
            "master": (state.master, exact["master"], p_bound),
            "param_out": (state.param_out, exact["master"], p_bound + ulp(state.master.double(), dtype) / 2),
        }
        for name, (got, wanted, bound) in bounds.items():
            assert ((got.double() - wanted).abs() / bound).max() <= 1, f"{name} at step {step}"
