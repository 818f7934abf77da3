"""What is there, whether it works, and what to change: an examination of the machine and of the runtime on it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from offload.doctor.device import NO_ACCELERATOR, examine_device
from offload.doctor.findings import Finding, remedies
from offload.doctor.host import examine_host
from offload.doctor.nvml import examine_nvml
from offload.doctor.software import examine_kernels, examine_versions

__all__ = ["GOOD", "NOT_GOOD", "NO_DEVICE", "Finding", "examine", "exit_status", "remedies"]

GOOD, NOT_GOOD, NO_DEVICE = 0, 1, 3  # exit statuses; 2 is a mistake in the arguments


def examine(device: torch.device | None, tell: Callable[[Finding], object] | None = None) -> list[Finding]:
    """Examine the host, and ``device`` where there is one; ``tell`` gets each finding as soon as it is there."""
    parts: list[Callable[[], list[Finding]]] = [
        examine_versions, examine_nvml, examine_host, lambda: examine_kernels(torch.device("cpu")),
    ]  # fmt: skip
    if device is None:
        parts.append(lambda: [NO_ACCELERATOR])
    else:
        found = device
        parts += [lambda: examine_kernels(found), lambda: examine_device(found)]
    findings = []
    for part in parts:
        for finding in part():
            findings.append(finding)
            if tell is not None:
                tell(finding)
    return findings


def exit_status(findings: list[Finding]) -> int:
    """0: an accelerator, and all is well. 1: something is bad. 3: no accelerator, and the rest is well."""
    if any(finding.status == "bad" for finding in findings):
        return NOT_GOOD
    return NO_DEVICE if NO_ACCELERATOR in findings else GOOD
