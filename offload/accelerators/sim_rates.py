"""What work costs on the emulated device, in virtual time."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from offload.accelerators.sim_device import devices, loaded, set_capacity

if TYPE_CHECKING:
    from offload.hardware import HardwareProfile

# Round figures of the order of a PCIe 4 desktop accelerator; a test that cares sets its own.
DEFAULT_RATES = {
    "h2d_bytes_per_s": 12e9,
    "d2h_bytes_per_s": 12e9,
    "both_bytes_per_s": math.inf,
    "pageable_bytes_per_s": 4e9,
    "peer_bytes_per_s": 24e9,
    "memory_bytes_per_s": 2e12,
    "flops": 50e12,
    "device_update_params_per_s": math.inf,
    "latency_s": 5e-6,
    "launch_s": 4e-6,
    "host_bytes_per_h2d_byte": 1.0,
    "host_bytes_per_d2h_byte": 1.0,
    "host_dram_bytes_per_s": math.inf,
    "host_update_params_per_s": math.inf,
}
_PAGEABLE_SHARE = 1 / 3  # of the link's rate, as in the figures above; profiles of machines do not say

_POSITIVE_RATES = DEFAULT_RATES.keys() - {
    "latency_s", "launch_s", "host_bytes_per_h2d_byte", "host_bytes_per_d2h_byte",
}  # fmt: skip

_update_rate = math.inf  # parameters/s of host work that says how many it updates


def set_profile(
    *,
    device: int | None = None,
    h2d_bytes_per_s: float | None = None,
    d2h_bytes_per_s: float | None = None,
    both_bytes_per_s: float | None = None,
    pageable_bytes_per_s: float | None = None,
    peer_bytes_per_s: float | None = None,
    memory_bytes_per_s: float | None = None,
    flops: float | None = None,
    device_update_params_per_s: float | None = None,
    latency_s: float | None = None,
    launch_s: float | None = None,
    host_bytes_per_h2d_byte: float | None = None,
    host_bytes_per_d2h_byte: float | None = None,
    host_dram_bytes_per_s: float | None = None,
    host_update_params_per_s: float | None = None,
) -> None:
    """Set what operations cost in virtual time (and what links cost in "threads"); None leaves a rate as it is.

    Args:
        device: index of the device that is meant, or all of them.
        h2d_bytes_per_s, d2h_bytes_per_s: link rates, each direction on its own.
        both_bytes_per_s: of each direction while both are busy; unlimited at first.
        pageable_bytes_per_s: link rate from or to host memory that is not pinned.
        peer_bytes_per_s: from this device to another, each way on its own.
        memory_bytes_per_s, flops: of the device; an operation takes the longer of the two.
        device_update_params_per_s: of this package's optimizers on the device, if their bytes take less; unlimited at
            first.
        latency_s: of a copy. launch_s: of the host, for each operation enqueued.
        host_bytes_per_h2d_byte, host_bytes_per_d2h_byte: what a copied byte takes of host memory.
        host_dram_bytes_per_s: of host memory, which all copies and declared host work share; unlimited at first.
        host_update_params_per_s: of host work that says how many parameters it updates. While this is unlimited, as at
            first, such work takes the time that it really took.
    """
    rates = {name: value for name, value in locals().items() if value is not None and name != "device"}
    for name, value in rates.items():
        if value < 0 or (value == 0 and name in _POSITIVE_RATES):
            raise ValueError(f"{name} must be positive, not {value}")
    _apply(rates, device)


def reset_rates() -> None:
    """What every device starts with."""
    _apply(dict(DEFAULT_RATES), None)


def _apply(rates: dict[str, float], device: int | None) -> None:
    global _update_rate
    extension = loaded()
    _update_rate = rates.pop("host_update_params_per_s", _update_rate)
    if "host_dram_bytes_per_s" in rates:
        extension.set_host_memory(rates.pop("host_dram_bytes_per_s"))
    for index in devices(device):
        extension.set_profile(index, rates)


def emulate(profile: HardwareProfile, device: int | None = None) -> None:
    """Play the machine of ``profile`` (see :meth:`offload.HardwareProfile.load`) in virtual time, and its capacity.

    One device does, or all of them. What the host does, and its memory, are those of the profile played last.

    Rates, latencies and what shares what are the profile's. An operator of the device takes its latency on the host,
    and on the device the time of its FLOPs or of its bytes, whichever is longer; an update of the optimizer takes what
    its parameters take on that machine, on the CPU and on the device. Copies of pageable memory go at a third of the
    link's rate, an assumption.

    Raises:
        RuntimeError: device memory is in use, which keeps the capacity from changing.
    """
    set_capacity(profile.device_memory_bytes, device)
    set_profile(
        device=device,
        h2d_bytes_per_s=profile.h2d_bytes_per_s,
        d2h_bytes_per_s=profile.d2h_bytes_per_s,
        both_bytes_per_s=profile.both_bytes_per_s,
        pageable_bytes_per_s=min(profile.h2d_bytes_per_s, profile.d2h_bytes_per_s) * _PAGEABLE_SHARE,
        memory_bytes_per_s=profile.device_memory_bytes_per_s,
        flops=profile.device_flops,
        device_update_params_per_s=profile.device_update_params_per_s,
        latency_s=profile.copy_latency_s,
        launch_s=profile.launch_latency_s,
        host_bytes_per_h2d_byte=profile.host_bytes_per_h2d_byte,
        host_bytes_per_d2h_byte=profile.host_bytes_per_d2h_byte,
        host_dram_bytes_per_s=profile.host_dram_bytes_per_s,
        host_update_params_per_s=profile.host_update_params_per_s,
    )


def update_seconds(numel: int, measured_s: float) -> float:
    """What a CPU update of ``numel`` parameters takes, where it took ``measured_s`` here."""
    return numel / _update_rate if math.isfinite(_update_rate) else measured_s
