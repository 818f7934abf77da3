"""Which device the small examples run on."""

from __future__ import annotations

import torch


def accelerator_or_emulated() -> torch.device:
    """This machine's accelerator, or the emulated one of :mod:`offload.testing.sim`, which is built on first use."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is not None:
        return found
    from offload.testing import sim

    sim.load()
    return torch.device("sim")
