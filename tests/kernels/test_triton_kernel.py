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

from offload.kernels import torch_reference, triton_kernel
from tests.kernels.states import RULES, assert_same_bits, clone, every_case
torch.accelerator.device_index = lambda index: __import__("contextlib").nullcontext()
for case in every_case(numel=1500, rules=RULES, seed=1):
    ours, theirs = case, clone(case)
    for scalars, rounding in zip(case.scalars, case.roundings):
        triton_kernel.step(ours.state, ours.grad, ours.param, scalars, rounding)
        torch_reference.step(theirs.state, theirs.grad, theirs.param, scalars, rounding)
    assert_same_bits(ours, theirs)
"""

TO_PTX = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from offload.kernels.triton_kernel import _update_kernel
pointers = [name for name in _update_kernel.arg_names if name.endswith("_ptr")]
signature = {name: "fp32" for name in _update_kernel.arg_names}
signature |= {name: "*fp32" for name in pointers} | {"grad_ptr": "*bf16", "param_ptr": "*bf16"}
signature |= {name: "i64" for name in ("numel", "num_scales", "key0", "key1", "first_index")}
constants = {"rule": "adam", "flag0": False, "flag1": False, "has_l2": True, "has_first": True, "has_second": True,
             "has_max": True, "has_param": True, "is_compact": False, "is_int8": False, "num_rows": 8, "block": 128}
signature |= {name: "constexpr" for name in constants}
source = ASTSource(_update_kernel, signature, constants)
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
