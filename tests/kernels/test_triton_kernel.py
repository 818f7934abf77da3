"""The triton kernel: its bits in triton's interpreter, and what its compiled code may not contain.

Both run in a process of their own, without a GPU, wherever triton is installed. The interpreter computes with NumPy,
whose multiply-add rounds twice; there, and only there, it is replaced by the C library's.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

IN_THE_INTERPRETER = """
import ctypes, ctypes.util, itertools, numpy, torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
fmaf = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
fmaf.argtypes, fmaf.restype = [ctypes.c_float] * 3, ctypes.c_float
once = numpy.frompyfunc(fmaf, 3, 1)
InterpreterBuilder.create_fma = lambda self, a, b, c: TensorHandle(
    once(a.data, b.data, c.data).astype(numpy.float32), a.dtype.scalar)

from offload.kernels import AdamScalars, torch_reference, triton_kernel
torch.accelerator.device_index = lambda index: __import__("contextlib").nullcontext()
generator = torch.Generator().manual_seed(0)
special = torch.tensor([0.0, -0.0, 1e-45, 1e-39, 3e-23, 1 / 3, 65520.0, 3e38, float("inf"), float("nan")])
def values(numel):
    ordinary = torch.randn(numel, generator=generator)
    chosen = special[torch.randint(len(special), (numel,), generator=generator)]
    return torch.where(torch.rand(numel, generator=generator) < 0.5, ordinary, chosen)
formats = (torch.float32, torch.bfloat16, torch.float16)
modes = (dict(decoupled=True, grad_scale=0.37), dict(decoupled=False, maximize=True),
         dict(decoupled=True, betas=(0.3, 0.9)))
for grad, out, mode, amsgrad in itertools.product(formats, (None, *formats), modes, (False, True)):
    numel = 1500
    ours = [values(numel), values(numel), values(numel).abs(), values(numel).to(grad),
            None if out is None else torch.zeros(numel, dtype=out), values(numel).abs() if amsgrad else None]
    theirs = [None if tensor is None else tensor.clone() for tensor in ours]
    for step in (1, 2):
        arguments = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, step=step) | mode
        scalars = AdamScalars.at_step(**arguments)
        triton_kernel.step(*ours, scalars)
        torch_reference.step(*theirs, scalars)
    for a, b in zip(ours, theirs):
        if a is not None:
            integer = torch.int32 if a.itemsize == 4 else torch.int16
            differs = (a.view(integer) != b.view(integer)) & ~(a.isnan() & b.isnan())
            assert not differs.any(), (grad, out, mode, amsgrad, a[differs][:3], b[differs][:3])
"""

TO_PTX = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from offload.kernels.triton_kernel import _adam_kernel
pointers = ["master_ptr", "exp_avg_ptr", "exp_avg_sq_ptr", "max_exp_avg_sq_ptr"]
signature = {name: "fp32" for name in _adam_kernel.arg_names}
signature |= {name: "*fp32" for name in pointers} | {"grad_ptr": "*bf16", "param_out_ptr": "*bf16", "numel": "i64"}
constants = {"has_l2": True, "lerp_from_grad": False, "amsgrad": True, "has_out": True, "block": 1024}
signature |= {name: "constexpr" for name in constants}
source = ASTSource(_adam_kernel, signature, constants)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
print(compiled.asm["ptx"])
"""


def run(code: str, **environment: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_same_bits_in_the_interpreter() -> None:
    run(IN_THE_INTERPRETER, TRITON_INTERPRET="1")


def test_compiled_code_rounds_every_operation_once_and_keeps_denormals() -> None:
    operations = re.findall(r"\b((?:fma|mul|add|sub|div|sqrt|rcp|rsqrt|ex2|max)\.[a-z.]*f32(?:x2)?)\b", run(TO_PTX))
    assert operations, "no arithmetic found"
    assert not [name for name in operations if "ftz" in name or "approx" in name or "full" in name]
    per_element = len([name for name in operations if name.startswith("sqrt")])
    count = {kind: len([name for name in operations if name.startswith(kind)]) for kind in ("fma", "div", "mul")}
    assert count == {"fma": 3 * per_element, "div": 2 * per_element, "mul": 5 * per_element}
