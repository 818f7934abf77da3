"""What differs between accelerators, and nothing else.

All of the runtime is written against ``torch.accelerator``, ``torch.Stream``, ``torch.Event``, ``copy_`` and pinned
memory. Exact-size pinning, and what only the emulated device can be told, go through :class:`Accelerator`.
"""

from __future__ import annotations

import torch

from offload.accelerators.base import Accelerator, DeviceMemory

__all__ = ["Accelerator", "DeviceMemory", "accelerator_for"]


def accelerator_for(device: torch.device) -> Accelerator:
    """The :class:`Accelerator` of ``device``.

    Raises:
        TypeError: ``device`` is not a ``torch.device``.
        ValueError: ``device`` is not an accelerator, or not the one that this process has.
    """
    if not isinstance(device, torch.device):
        raise TypeError(f"device must be a torch.device, not {device!r}: write torch.device({str(device)!r})")
    available = torch.accelerator.current_accelerator()
    if available is None or device.type != available.type:
        accepted = f"one of type {available.type!r}" if available else "none: this process has no accelerator"
        raise ValueError(
            f"no accelerator for device {str(device)!r}; accepted is {accepted}. Move the parameters there, or call "
            "offload.testing.sim.load() first to get the emulated device 'sim'"
        )
    if device.index is None:
        device = torch.device(device.type, torch.accelerator.current_device_index())
    match device.type:
        case "cuda":
            from offload.accelerators.cuda import CudaAccelerator

            return CudaAccelerator(device)
        case "sim":
            from offload.accelerators.sim import SimAccelerator

            return SimAccelerator(device)
    return Accelerator(device)
