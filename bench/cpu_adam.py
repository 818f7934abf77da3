"""The CPU update against the ways torch and DeepSpeed have to do the same job.

    python bench/cpu_adam.py [--numel 16777216] [--threads 2] [--repeats 9] [--json FILE]

Two jobs. "step": AdamW on fp32 gradients. "offload": what a mixed-precision host update has to do, that is unscale the
gradient, step, and write the 16-bit parameter; torch and DeepSpeed take it in passes. All cases of a job work on the
same buffers, taking turns within each repeat, so that a disturbance of the machine meets all of them. Before timing,
each torch case must give the same bits as ours. Memory is what torch.empty gives: no huge pages asked for.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offload.kernels import AdamScalars, adam_step, available_implementations

HYPER = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
GRAD_SCALE = 2.0**-10
STEP = 10
SLOW = ("scalar", "torch")  # tens of times slower: correct fallbacks, not worth a benchmark's patience

Case = Callable[[], None]


class Buffers:
    """State of ``numel`` parameters, and gradients and copies in the dtypes of both jobs."""

    def __init__(self, numel: int) -> None:
        self.master = torch.randn(numel)
        self.exp_avg = torch.randn(numel) * 1e-2
        self.exp_avg_sq = torch.rand(numel) * 1e-4
        self.grad = torch.randn(numel)
        self.grad_bf16 = self.grad.bfloat16()
        self.unscaled = torch.empty(numel)
        self.param_bf16 = torch.empty(numel, dtype=torch.bfloat16)

    def ours(self, implementation: str, grad: Tensor, out: Tensor | None, num_threads: int, grad_scale: float) -> None:
        scalars = AdamScalars.at_step(step=STEP, decoupled=True, grad_scale=grad_scale, **HYPER)
        state = (self.master, self.exp_avg, self.exp_avg_sq)
        adam_step(*state, grad, out, scalars=scalars, implementation=implementation, num_threads=num_threads)

    def torch_fused(self, grad: Tensor) -> None:
        beta1, beta2 = HYPER["betas"]
        torch._fused_adamw_(
            *([self.master], [grad], [self.exp_avg], [self.exp_avg_sq], [], [torch.tensor(float(STEP))]),
            lr=HYPER["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=HYPER["weight_decay"],
            eps=HYPER["eps"],
            amsgrad=False,
            maximize=False,
        )

    def torch_passes(self) -> None:
        torch.mul(self.grad, GRAD_SCALE, out=self.unscaled)
        self.torch_fused(self.unscaled)
        self.param_bf16.copy_(self.master)


def deepspeed_step(buffers: Buffers, grad: Tensor) -> Case:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    param = torch.nn.Parameter(buffers.master)
    optimizer = DeepSpeedCPUAdam([param], adamw_mode=True, **HYPER)
    optimizer.state[param] = {"step": STEP - 1, "exp_avg": buffers.exp_avg, "exp_avg_sq": buffers.exp_avg_sq}
    param.grad = grad
    return optimizer.step


def jobs(buffers: Buffers, num_threads: int) -> dict[str, dict[str, Case]]:
    """Cases by job; the first of each job is what the others are compared with."""
    fast = [name for name in available_implementations() if name not in SLOW]
    step: dict[str, Case] = {}
    offload: dict[str, Case] = {}
    for name in fast:
        step[f"ours {name}"] = lambda name=name: buffers.ours(name, buffers.grad, None, num_threads, 1.0)
        for label, grad in (("bf16", buffers.grad_bf16), ("fp32", buffers.grad)):
            offload[f"ours {name}, {label} gradient"] = lambda name=name, grad=grad: buffers.ours(
                name, grad, buffers.param_bf16, num_threads, GRAD_SCALE
            )
    step["torch fused"] = lambda: buffers.torch_fused(buffers.grad)
    offload["torch mul_, fused, copy_"] = buffers.torch_passes
    if importlib.util.find_spec("deepspeed"):
        step["DeepSpeedCPUAdam"] = deepspeed_step(buffers, buffers.grad)
        update = deepspeed_step(buffers, buffers.unscaled)

        def deepspeed_passes() -> None:
            torch.mul(buffers.grad, GRAD_SCALE, out=buffers.unscaled)
            update()
            buffers.param_bf16.copy_(buffers.master)

        offload["DeepSpeed mul_, CPUAdam, copy_"] = deepspeed_passes
    return {"step": step, "offload": offload}


def check_bits(numel: int = 1 << 12) -> None:
    """Fast and wrong is no result: ours and torch's passes agree on the whole state first."""
    for ours in (name for name in available_implementations() if name not in SLOW):
        results = []
        for run in ("ours", "torch"):
            torch.manual_seed(0)
            buffers = Buffers(numel)
            if run == "ours":
                buffers.ours(ours, buffers.grad, buffers.param_bf16, 1, GRAD_SCALE)
            else:
                buffers.torch_passes()
            results.append((buffers.master, buffers.exp_avg, buffers.exp_avg_sq, buffers.param_bf16))
        if not all(map(torch.equal, *results)):
            raise SystemExit(f"{ours} and torch's passes disagree: nothing was timed")


def time_cases(cases: dict[str, Case], repeats: int) -> dict[str, float]:
    """Median seconds of each case, the cases taking turns; one untimed turn first."""
    times_s: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(repeats + 1):
        for name, case in cases.items():
            start_s = time.perf_counter()
            case()
            if repeat > 0:
                times_s[name].append(time.perf_counter() - start_s)
    return {name: statistics.median(each) for name, each in times_s.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=1 << 24, help="parameters per update")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="for ours and for torch")
    parser.add_argument("--repeats", type=int, default=9, help="timed turns; medians are printed")
    parser.add_argument("--json", type=Path, help="write the results here as well")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    check_bits()
    buffers = Buffers(arguments.numel)
    results: dict[str, Any] = {
        "numel": arguments.numel,
        "threads": arguments.threads,
        "repeats": arguments.repeats,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "median_s": {},
    }
    print(f"{arguments.numel:,} parameters, {arguments.threads} threads, median of {arguments.repeats}")
    for job, cases in jobs(buffers, arguments.threads).items():
        medians_s = time_cases(cases, arguments.repeats)
        results["median_s"][job] = medians_s
        first_s = next(iter(medians_s.values()))
        print(f"\n{job:<34}{'ns/param':>9}{'ratio':>7}")
        for name, seconds in medians_s.items():
            print(f"  {name:<32}{seconds / arguments.numel * 1e9:>9.3f}{seconds / first_s:>7.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
