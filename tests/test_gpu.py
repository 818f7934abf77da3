"""What only a CUDA device can show: its kernels' bits, its streams, and a device other than the first."""

from __future__ import annotations

import pytest
import torch

import offload
from offload.kernels import default_implementation, self_test, torch_reference
from tests.training import assert_same_bits, mlp, snapshot, train

pytestmark = pytest.mark.gpu
LAST = f"cuda:{torch.cuda.device_count() - 1}"
PLANS = ["host", "device", "auto", offload.Stride(2), offload.Static(0.3)]


def test_the_triton_kernel_gives_the_reference_bits() -> None:
    from offload.kernels import triton_kernel

    assert self_test.agree(triton_kernel.step, torch_reference.step, LAST)
    assert default_implementation("cuda") == "triton"


def trained_on_gpu(plan: object, dtype: torch.dtype, stream: torch.Stream | None = None) -> object:
    """The same gradients on every plan: the model is small enough that cuBLAS is deterministic for it."""
    model = mlp(dtype=dtype, device=LAST)
    optimizer = offload.AdamW(model.parameters(), lr=1e-2, subgroup_numel=500, plan=plan)
    if stream is None:
        train(model, optimizer)
    else:
        with stream:
            train(model, optimizer)
    optimizer.synchronize()
    torch.accelerator.synchronize()
    return snapshot(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_plan_gives_the_same_bits(dtype: torch.dtype) -> None:
    results = [trained_on_gpu(plan, dtype) for plan in PLANS]
    for result in results[1:]:
        assert_same_bits(result, results[0])


def test_a_side_stream_gives_the_same_bits() -> None:
    stream = torch.Stream(torch.device(LAST))
    assert_same_bits(trained_on_gpu(offload.Stride(2), torch.float32, stream), trained_on_gpu("host", torch.float32))
