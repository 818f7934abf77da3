"""Versions, and the numeric self-test of every kernel."""

from __future__ import annotations

import importlib.metadata

import torch
from torch import Tensor

from offload.doctor.findings import RATE, RIGHT, RUNS, Finding
from offload.kernels import (
    Rounding,
    Scalars,
    State,
    available_implementations,
    default_implementation,
    self_test,
    torch_reference,
    update,
)

_PACKAGES = ("torch", "deepspeed", "transformers", "numba", "triton")
_SLOW = ("scalar", "torch")  # correct fallbacks
_REMEDIES = {
    "cpu": "install a C++ compiler and this package again, for the fast CPU kernel",
    "cuda": "install triton and a C compiler, for the fast device kernel",
}


def examine_versions() -> list[Finding]:
    """What is installed. Reads the packages' metadata, and imports none of them."""
    return [Finding("versions", "good", ", ".join(map(_version, _PACKAGES)))]


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {package}"


def examine_kernels(device: torch.device) -> list[Finding]:
    """The numeric self-test of every implementation of the update that serves ``device``."""
    findings = [_examine_kernel(name, device) for name in available_implementations(device)]
    chosen = default_implementation(device)
    if chosen in _SLOW and device.type in _REMEDIES:
        text = f"{chosen} is the best there is on {device.type}, and slow"
        findings.append(Finding("kernel", "bad", text, _REMEDIES[device.type], RATE))
    return findings


def _examine_kernel(name: str, device: torch.device) -> Finding:
    def step(state: State, grad: Tensor, param: Tensor | None, scalars: Scalars, rounding: Rounding) -> None:
        update(state, grad, param, scalars=scalars, rounding=rounding, implementation=name)

    try:
        agrees = self_test.agree(step, torch_reference.step, device)
    except RuntimeError as error:
        text = f"{name} on {device.type} failed: {str(error).splitlines()[0]}"
        return Finding("kernel", "bad", text, f"report this; meanwhile, avoid {name} (OFFLOAD_KERNEL)", RUNS)
    if not agrees:
        text = f"{name} on {device.type} gives other bits than the reference"
        return Finding("kernel", "bad", text, f"do not train with {name}: report this", RIGHT)
    return Finding("kernel", "good", f"{name} on {device.type} gives the reference's bits")
