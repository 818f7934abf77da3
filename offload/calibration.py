"""Measure this machine: link, host memory, update rates. The result is a hardware profile like those that ship.

Copies are timed by events of their streams, host work by the host's clock, each by the median of repeats after one that
does not count.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from offload.accelerators import Accelerator, accelerator_for
from offload.hardware import Figure, HardwareProfile
from offload.kernels import AdamScalars, adam_step

DEFAULT_NUMEL = 1 << 24  # parameters of an update that is timed; its fp32 state is 192 MiB
REPEATS = 5
LATENCY_BYTES = 4096
MATMUL_WIDTH = 1024  # of the matrices whose product is timed; half the root of the parameters where those are few
# Host memory traffic of an update, a parameter with bfloat16 gradients: see Subgroup.host_update_bytes.
UPDATE_HOST_BYTES = {"fp32": 28, "split16": 26, "bf16": 18, "int8": 14.125}


def calibrate(
    device: torch.device | str | None = None,
    *,
    name: str = "this machine",
    numel: int = DEFAULT_NUMEL,
    num_ranks_per_node: int = 1,
) -> HardwareProfile:
    """Measure ``device`` (default: the current accelerator) and its host.

    Args:
        numel: parameters of the updates that are timed; the largest copies are as large as their states.
        num_ranks_per_node: written into the profile. Where several ranks share a host, run one calibration on each at
            the same time: rates are those of a rank while all work.

    Raises:
        ValueError: without an accelerator, or for a ``numel`` too small to time.
    """
    if numel < 1 << 16:
        raise ValueError(f"numel={numel} is too few to time; give {1 << 16} or more")
    found = torch.accelerator.current_accelerator(check_available=True) if device is None else torch.device(device)
    if found is None or found.type == "cpu":
        raise ValueError(
            "there is no accelerator to calibrate; on a machine without one, use a shipped profile, or calibrate the "
            "emulated device (offload.testing.sim.load(), or `offload calibrate --emulated`)"
        )
    bench = _Bench(accelerator_for(found), numel)
    figures = {key: Figure(value, "measured", source) for key, (value, source) in bench.measure().items()}
    host_rate = figures["host_update_params_per_s"].value
    for state_format in ("split16", "bf16", "int8"):
        ratio = UPDATE_HOST_BYTES["fp32"] / UPDATE_HOST_BYTES[state_format]
        source = f"host_update_params_per_s times {ratio:.3g}, the ratio of bytes in host memory"
        figures[f"host_update_{state_format}_params_per_s"] = Figure(host_rate * ratio, "derived", source)
    for phase in ("forward", "backward"):
        source = "launches and gathering are hidden behind the device's work"
        figures[f"{phase}_layer_latency_s"] = Figure(0.0, "assumed", source)
    figures["num_ranks_per_node"] = Figure(num_ranks_per_node, "assumed", "as given to calibrate")
    return HardwareProfile.from_figures(name, f"{found.type} device, measured by offload calibrate", figures)


@dataclass(slots=True)
class _Bench:
    """The measurements; each returns its value."""

    accelerator: Accelerator
    numel: int

    def measure(self) -> dict[str, tuple[float, str]]:
        """Every measured figure with how it was measured."""
        num_bytes = 12 * self.numel
        on_host, on_device = self.accelerator.pinned_empty(num_bytes), self._empty(num_bytes, torch.uint8)
        back = self.accelerator.pinned_empty(num_bytes)
        size = f"{num_bytes / 1e6:.0f} MB of pinned memory"
        up_s, down_s = self._copy_s(on_device, on_host), self._copy_s(back, on_device)
        up, down = num_bytes / up_s, num_bytes / down_s
        both = min(up, down, self._both(on_host, on_device, back))
        latency_s = self._copy_s(on_device[:LATENCY_BYTES], on_host[:LATENCY_BYTES])
        host_alone = self._host_update()
        dram = max(self._host_copy(), host_alone * UPDATE_HOST_BYTES["fp32"])
        taken_up, taken_down = (
            self._taken(host_alone, target, source) for target, source in ((on_device, on_host), (back, on_device))
        )
        width = min(MATMUL_WIDTH, math.isqrt(self.numel) // 2)
        matmul = f"matmul of {width} x {width} in bfloat16"
        return {
            "h2d_bytes_per_s": (up, f"{size} to the device"),
            "d2h_bytes_per_s": (down, f"{size} from the device"),
            "both_bytes_per_s": (both, f"{size} each way at once, the slower way, at most either alone"),
            "copy_latency_s": (latency_s, f"a copy of {LATENCY_BYTES} bytes"),
            "launch_latency_s": (self._device_s(lambda: on_device[:1].zero_()), "writing one byte on the device"),
            "host_bytes_per_h2d_byte": (taken_up, "what a CPU update beside copies to the device lost"),
            "host_bytes_per_d2h_byte": (taken_down, "what a CPU update beside copies from the device lost"),
            "host_dram_bytes_per_s": (dram, "a copy within host memory or a CPU update, whichever moves more"),
            "host_update_params_per_s": (host_alone, f"fused update of {self.numel} parameters, bfloat16 gradients"),
            "blocking_upcast_params_per_s": (self._blocking(up=False), "fp32_host.copy_(bf16_device)"),
            "blocking_downcast_params_per_s": (self._blocking(up=True), "bf16_device.copy_(fp32_host)"),
            "device_update_params_per_s": (self._device_update(), f"fused update of {self.numel} parameters"),
            "device_memory_bytes": (self.accelerator.memory().total_bytes, "the device's own count"),
            "device_memory_bytes_per_s": (self._device_copy(), "a copy within device memory, bytes read and written"),
            "device_flops": (self._matmul(width), matmul),
        }

    # ---- clocks

    def _empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(numel, dtype=dtype, device=self.accelerator.device)

    def _device_s(self, run: Callable[[], object]) -> float:
        """Median seconds of ``run`` on the current stream, by events."""
        times_s = []
        for _ in range(REPEATS + 1):
            begin, end = (torch.Event(self.accelerator.device, enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            times_s.append(begin.elapsed_time(end) / 1e3)
        return max(statistics.median(times_s[1:]), 1e-9)

    @staticmethod
    def _host_s(run: Callable[[], object]) -> float:
        times_s = []
        for _ in range(REPEATS + 1):
            start_s = time.perf_counter()
            run()
            times_s.append(time.perf_counter() - start_s)
        return statistics.median(times_s[1:])

    # ---- link

    def _copy_s(self, target: Tensor, source: Tensor) -> float:
        return self._device_s(lambda: target.copy_(source, non_blocking=True))

    def _both(self, on_host: Tensor, on_device: Tensor, back: Tensor) -> float:
        """Bytes/s of the slower direction while the other outlasts it or is done at the same time."""
        device, half = self.accelerator.device, on_device.numel() // 2
        pairs = ((on_device[:half], on_host[:half]), (back[:half], on_device[half : 2 * half]))
        streams = [torch.Stream(device) for _ in pairs]
        torch.accelerator.synchronize(device)
        stamps = []
        for stream in streams:
            stamps.append([torch.Event(device, enable_timing=True) for _ in range(2)])
            stamps[-1][0].record(stream)
        for _ in range(REPEATS):
            for stream, (target, source) in zip(streams, pairs, strict=True):
                with stream:
                    target.copy_(source, non_blocking=True)
        for stream, (_, end) in zip(streams, stamps, strict=True):
            end.record(stream)
        torch.accelerator.synchronize(device)
        slowest_s = max(begin.elapsed_time(end) for begin, end in stamps) / 1e3
        return REPEATS * half / max(slowest_s, 1e-9)

    def _blocking(self, *, up: bool) -> float:
        """Parameters/s of a blocking copy that converts; by the longer of two clocks, as both sides take part."""
        on_device, on_host = self._empty(self.numel, torch.bfloat16), torch.zeros(self.numel)

        def copy() -> None:
            if up:
                on_device.copy_(on_host)
            else:
                on_host.copy_(on_device)

        return self.numel / max(self._device_s(copy), self._host_s(copy))

    # ---- host

    def _host_update(self) -> float:
        master, exp_avg, exp_avg_sq = (torch.zeros(self.numel) for _ in range(3))
        grad, param = (torch.zeros(self.numel, dtype=torch.bfloat16) for _ in range(2))
        return self.numel / self._host_s(lambda: adam_step(master, exp_avg, exp_avg_sq, grad, param, scalars=_SCALARS))

    def _host_copy(self) -> float:
        source, target = torch.zeros(3 * self.numel), torch.zeros(3 * self.numel)
        return 2 * source.nbytes / self._host_s(lambda: target.copy_(source))

    def _taken(self, host_alone: float, target: Tensor, source: Tensor) -> float:
        """Bytes of host memory that a copied byte takes from a CPU update: what the update loses, over what is copied.

        The copies are enqueued before the update and outlast it, as far as one update's time can tell.
        """
        device, stream = self.accelerator.device, torch.Stream(self.accelerator.device)
        copy_s = self._copy_s(target, source)
        num_copies = math.ceil((REPEATS + 2) * self.numel / host_alone / copy_s)
        with stream:
            for _ in range(min(num_copies, 256)):
                target.copy_(source, non_blocking=True)
        beside = self._host_update()
        torch.accelerator.synchronize(device)
        lost = max(0.0, host_alone - beside) * UPDATE_HOST_BYTES["fp32"]
        return max(lost / (source.nbytes / copy_s), _LEAST_TAKEN)

    # ---- device

    def _device_update(self) -> float:
        master, exp_avg, exp_avg_sq = (self._empty(self.numel, torch.float32).zero_() for _ in range(3))
        grad, param = (self._empty(self.numel, torch.bfloat16).zero_() for _ in range(2))
        return self.numel / self._device_s(
            lambda: adam_step(master, exp_avg, exp_avg_sq, grad, param, scalars=_SCALARS)
        )

    def _device_copy(self) -> float:
        source, target = self._empty(3 * self.numel, torch.float32), self._empty(3 * self.numel, torch.float32)
        return 2 * source.nbytes / self._device_s(lambda: target.copy_(source))

    def _matmul(self, width: int) -> float:
        a = self._empty(width**2, torch.bfloat16).zero_().view(width, width)
        return 2 * width**3 / self._device_s(lambda: a @ a)


_LEAST_TAKEN = 0.01  # a profile's figures are positive
_SCALARS = AdamScalars.at_step(
    step=1, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled=True, grad_scale=1.0
)
