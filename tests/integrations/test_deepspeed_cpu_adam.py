"""Against DeepSpeed's own offloading with its compiled DeepSpeedCPUAdam: not the same bits, but within a bound."""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.integrations.deepspeed_training import HYPER, close, config, engine_of, ours, snapshot

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning"),
    pytest.mark.slow,  # DeepSpeed compiles its Adam for minutes first
]

NUM_STEPS = 20
ULPS_PER_STEP = 4  # docs/deepspeed.md derives it


class Linear(nn.Module):
    """Linear in the parameters: gradients do not depend on them, so that differences do not feed back."""

    def __init__(self) -> None:
        super().__init__()
        self.params = nn.ParameterList(nn.Parameter(torch.randn(size)) for size in (1000, 37, 640))

    def forward(self, slopes: list[Tensor]) -> Tensor:
        return torch.stack([(p * slope).float().sum() for p, slope in zip(self.params, slopes, strict=True)]).sum()


def slopes_of(micro_step: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(micro_step)
    return [torch.randn(size, generator=generator).to(dtype).to("sim") for size in (1000, 37, 640)]


def masters_after(configuration: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(0)
    engine = engine_of(configuration, Linear())
    for micro_step in range(NUM_STEPS * engine.gradient_accumulation_steps()):
        engine.backward(engine(slopes_of(micro_step, dtype)))
        engine.step()
    assert engine.skipped_steps == 0
    masters = snapshot(engine)[1]
    close(engine)
    return masters


@pytest.mark.parametrize(
    ("stage", "dtype", "clip", "num_micro"),
    [
        (2 + rank % 2, dtype, clip, num_micro)
        for rank, (dtype, clip, num_micro) in enumerate(itertools.product(("bf16", "fp16", "fp32"), (0.5, 0.0), (1, 4)))
    ],
)
def test_masters_are_within_the_bound(ds: ModuleType, stage: int, dtype: str, clip: float, num_micro: int) -> None:
    of_name = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    stock = config(stage, dtype, clip=clip, num_micro=num_micro)
    stock["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    theirs = masters_after({**stock, "optimizer": {"type": "AdamW", "params": dict(HYPER)}}, of_name)
    here = masters_after(ours(config(stage, dtype, clip=clip, num_micro=num_micro)), of_name)
    worst = 0.0
    for name, master in here.items():
        scale = torch.maximum(master.abs(), torch.tensor(NUM_STEPS * HYPER["lr"]))
        ulp = torch.nextafter(scale, torch.tensor(torch.inf)) - scale
        worst = max(worst, float(((master - theirs[name]).abs() / ulp).max()))
    print(f"at most {worst:.1f} ulp apart")
    assert worst <= ULPS_PER_STEP * NUM_STEPS
