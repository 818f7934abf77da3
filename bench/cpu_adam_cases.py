"""What bench.cpu_adam compares: two jobs over the same memory, ours and the peers' ways to do them.

"step" is AdamW on fp32 gradients: 28 bytes read and written per parameter. "offload" is what a mixed-precision host
update has to do, that is unscale the gradient, step, and write the 16-bit parameter: one pass over 28 bytes for us with
16-bit gradients, three passes over 42 for torch and for DeepSpeed's ZeRO-3 with their fp32 gradients.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from bench.interleaved import Case
from offload import host_memory
from offload.kernels import (
    STATE_FORMATS,
    AdamScalars,
    Rounding,
    State,
    adam_step,
    available_implementations,
    native,
    update,
)
from offload.kernels.state import num_blocks, row_dtypes

HYPER = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
STEP = 10
# A parameter's share of all that one size needs: buffers, twice for the comparison of pages, the state in each compact
# format, and the temporaries of torch's foreach.
BYTES_PER_PARAM = 2 * 20 + (10 + 6 + 4) + 12
APART_BYTES = 17 << 12

STREAM, OURS, OURS_OFFLOAD = "stream of the same bytes", "ours", "ours, bf16 gradient"
ZERO3, TORCH_PASSES = "ZeRO-3: mul_, CPUAdam, copy_", "torch: mul_, fused, copy_"
DEEPSPEED, TORCH_FUSED = "DeepSpeedCPUAdam", "torch fused"
# In the pages that torch's allocator gives the peers' users, where ours asks for huge ones.
ORDINARY_PAGES, DEEPSPEED_ORDINARY = "ours, ordinary pages", "DeepSpeedCPUAdam, ordinary pages"
ZERO3_ORDINARY = "ZeRO-3, ordinary pages"


def state_case(state_format: str) -> str:
    """Name of the offload job with the state in a compact format."""
    return f"ours, state {state_format}"


def fastest() -> str:
    """The compiled kernel's best instruction set here."""
    name = available_implementations()[0]
    if name not in native.ISA_CODES:
        raise SystemExit("the compiled kernel is missing: build it, or there is nothing to measure")
    return name


def empty_arrays(numel: int, *dtypes: torch.dtype, ordinary_pages: bool = False) -> list[Tensor]:
    """Arrays one after another in memory, apart as those of [Note: rows that collide] in offload/host_memory.py."""
    sizes = [numel * dtype.itemsize + APART_BYTES for dtype in dtypes]
    memory = torch.empty(sum(sizes), dtype=torch.uint8) if ordinary_pages else host_memory.empty(sum(sizes))
    parts = zip(memory.split(sizes), dtypes, strict=True)
    return [part[: numel * dtype.itemsize].view(dtype) for part, dtype in parts]


class Buffers:
    """State, gradients and parameter copies of ``numel`` parameters, with values as in training."""

    def __init__(self, numel: int, *, ordinary_pages: bool = False) -> None:
        dtypes = (*[torch.float32] * 4, torch.bfloat16, torch.bfloat16)
        arrays = empty_arrays(numel, *dtypes, ordinary_pages=ordinary_pages)
        self.master, self.exp_avg, self.exp_avg_sq, self.grad, self.grad_bf16, self.out = arrays
        self.master.uniform_(-1, 1)
        self.exp_avg.uniform_(-1e-2, 1e-2)
        self.exp_avg_sq.uniform_(0, 1e-4)
        self.grad.uniform_(-1, 1)
        self.grad_bf16.copy_(self.grad)
        self.out.copy_(self.master)

    @property
    def state(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.master, self.exp_avg, self.exp_avg_sq

    def ours(self, name: str, grad: Tensor, out: Tensor | None, num_threads: int, grad_scale: float = 1.0) -> None:
        scalars = AdamScalars.at_step(step=STEP, decoupled=True, grad_scale=grad_scale, **HYPER)
        adam_step(*self.state, grad, out, scalars=scalars, implementation=name, num_threads=num_threads)

    def stream(self, num_threads: int) -> None:
        kernel = native.load()
        assert kernel is not None
        kernel.stream(fastest(), *self.state, self.grad, num_threads)

    def torch_fused(self) -> None:
        beta1, beta2 = HYPER["betas"]
        torch._fused_adamw_(
            *([self.master], [self.grad], [self.exp_avg], [self.exp_avg_sq], [], [torch.tensor(float(STEP))]),
            lr=HYPER["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=HYPER["weight_decay"],
            eps=HYPER["eps"],
            amsgrad=False,
            maximize=False,
        )

    def torch_passes(self, grad_scale: float = 1.0) -> None:
        self.grad.mul_(grad_scale)
        self.torch_fused()
        self.out.copy_(self.master)

    def torch_foreach(self) -> torch.optim.AdamW:
        param = torch.nn.Parameter(self.master)
        param.grad = self.grad
        optimizer = torch.optim.AdamW([param], foreach=True, **HYPER)
        moments = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        optimizer.state[param] = {"step": torch.tensor(float(STEP)), **moments}
        return optimizer


@dataclass(slots=True)
class Jobs:
    """Cases by job, and why a peer isn't among them."""

    step: dict[str, Case] = field(default_factory=dict)
    offload: dict[str, Case] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def make_jobs(buffers: Buffers, num_threads: int, *, quick: bool) -> Jobs:
    """All cases for ``num_threads`` threads. With ``quick`` those that would first have to be compiled are left out."""
    torch.set_num_threads(num_threads)
    name, jobs = fastest(), Jobs()
    ours = functools.partial(buffers.ours, num_threads=num_threads)
    jobs.step[STREAM] = lambda: buffers.stream(num_threads)
    jobs.step[OURS] = lambda: ours(name, buffers.grad, None)
    ordinary = Buffers(buffers.master.numel(), ordinary_pages=True) if host_memory.uses_huge_pages() else None
    if ordinary is not None:
        jobs.step[ORDINARY_PAGES] = lambda: ordinary.ours(name, ordinary.grad, None, num_threads)
    jobs.step[TORCH_FUSED] = buffers.torch_fused
    jobs.offload[OURS_OFFLOAD] = lambda: ours(name, buffers.grad_bf16, buffers.out)
    jobs.offload["ours, fp32 gradient"] = lambda: ours(name, buffers.grad, buffers.out)
    jobs.offload[TORCH_PASSES] = lambda: buffers.torch_passes()
    for state_format in STATE_FORMATS[1:]:
        jobs.offload[state_case(state_format)] = _compact_case(buffers, state_format, num_threads)
    if "numba" in available_implementations():
        jobs.step["numba"] = lambda: ours("numba", buffers.grad, None)
    else:
        jobs.missing["numba"] = "not installed"
    jobs.step["torch foreach"] = buffers.torch_foreach().step
    if quick:
        jobs.missing["torch compiled"] = "left out of a quick run: it is compiled first"
    else:
        torch.compiler.reset()  # what was compiled for another number of threads
        jobs.step["torch compiled"] = torch.compile(buffers.torch_foreach().step)
    _add_deepspeed(jobs, buffers, ordinary, num_threads, quick=quick)
    return jobs


def _compact_case(buffers: Buffers, state_format: str, num_threads: int) -> Case:
    """The offload job over state in another format, of its own and all zero: values don't change how long it takes."""
    numel = buffers.master.numel()
    rows = {name: dtype for name, dtype in row_dtypes(state_format).items() if name in ("master", "first", "second")}
    scales = {f"{name}_scale": torch.zeros(num_blocks(numel)) for name, dtype in rows.items() if dtype.itemsize == 1}
    arrays = empty_arrays(numel, *rows.values())
    state = State(state_format, **{name: array.zero_() for name, array in zip(rows, arrays, strict=True)}, **scales)
    scalars = AdamScalars.at_step(step=STEP, decoupled=True, **HYPER)
    roundings = itertools.count(STEP)

    def step() -> None:
        update(
            *(state, buffers.grad_bf16, buffers.out),
            scalars=scalars,
            rounding=Rounding.at_step(0, next(roundings)),
            implementation=fastest(),
            num_threads=num_threads,
        )

    return step


def _add_deepspeed(jobs: Jobs, buffers: Buffers, ordinary: Buffers | None, num_threads: int, *, quick: bool) -> None:
    reason = None
    if importlib.util.find_spec("deepspeed") is None:
        reason = "not installed"
    elif lock := next(_extension_files("cpu_adam/lock"), None):
        reason = f"left out: a build of its operator is under way, or was killed; if none is, delete {lock}"
    elif quick and not any(_extension_files("cpu_adam.so")):
        reason = "left out of a quick run: its operator is compiled at the first full one"
    if reason is not None:
        jobs.missing |= {DEEPSPEED: reason, ZERO3: reason}
        return
    # DeepSpeed's operator has an OpenMP runtime beside torch's, so torch.set_num_threads doesn't reach it.
    jobs.step[DEEPSPEED], jobs.offload[ZERO3] = _deepspeed_cases(buffers)
    if ordinary is not None:
        jobs.step[DEEPSPEED_ORDINARY], jobs.offload[ZERO3_ORDINARY] = _deepspeed_cases(ordinary)
    ctypes.CDLL("libgomp.so.1").omp_set_num_threads(num_threads)


def _deepspeed_cases(buffers: Buffers) -> tuple[Case, Case]:
    """DeepSpeedCPUAdam alone, and what stage 3 does with it."""
    step = _deepspeed_step(buffers)

    def zero3() -> None:
        """unscale_and_clip_grads, _optimizer_step and _reassign_or_swap_out_partitioned_parameters of stage3.py."""
        buffers.grad.mul_(1.0)
        step()
        buffers.out.copy_(buffers.master)

    return step, zero3


def _extension_files(name: str) -> Iterator[Path]:
    """Of torch's cache of extensions. Whoever finds a lock there waits for it, for ever if its owner was killed."""
    from torch.utils import cpp_extension

    root = os.environ.get("TORCH_EXTENSIONS_DIR", cpp_extension.get_default_build_root())
    return Path(root).glob(f"**/{name}")


def _deepspeed_step(buffers: Buffers) -> Case:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))  # for ninja
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    param = torch.nn.Parameter(buffers.master)
    optimizer = DeepSpeedCPUAdam([param], adamw_mode=True, **HYPER)
    optimizer.state[param] = {"step": STEP, "exp_avg": buffers.exp_avg, "exp_avg_sq": buffers.exp_avg_sq}
    param.grad = buffers.grad
    return optimizer.step


def check_bits(numel: int = 1 << 12) -> None:
    """Fast and wrong is no result: our kernels and torch's passes agree on the whole state first."""
    grad_scale = 2.0**-10
    for name in {fastest(), "numba"} & set(available_implementations()):
        results = []
        for run in ("ours", "torch"):
            torch.manual_seed(0)
            buffers = Buffers(numel)
            if run == "ours":
                buffers.ours(name, buffers.grad, buffers.out, 1, grad_scale)
            else:
                buffers.torch_passes(grad_scale)
            results.append((*buffers.state, buffers.out))
        if not all(map(torch.equal, *results)):
            raise SystemExit(f"{name} and torch's passes disagree: nothing was timed")
