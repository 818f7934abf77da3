"""Lower bounds in closed form: what no schedule can beat. They stand beside predictions as a check, and say what binds.

Each resource needs some time for its share of the work, however well everything overlaps; the longest of these times is
the bound. Filling and draining the pipeline, latencies and waits come on top: that is what a prediction adds.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from offload.perf_model import Rates
from offload.plan import OpKind, Plan
from offload.subgroup import FLOAT32_BYTES, Subgroup


@dataclass(frozen=True, slots=True)
class Load:
    """The work of an update, by resource: bytes over the link, bytes the CPU reads and writes, parameters updated."""

    up_bytes: float = 0.0
    down_bytes: float = 0.0
    cpu_bytes: float = 0.0
    host_numel: float = 0.0
    device_numel: float = 0.0


@dataclass(frozen=True, slots=True)
class Bound:
    """Seconds that each resource ("link up", "link down", "host memory", "cores", "device") needs at least."""

    seconds_of: dict[str, float]

    @property
    def seconds(self) -> float:
        return max(self.seconds_of.values())

    @property
    def binds(self) -> str:
        """The resource that needs longest; the first of equals."""
        return max(self.seconds_of, key=lambda resource: self.seconds_of[resource])


def bound_of(load: Load, rates: Rates) -> Bound:
    """Seconds each resource of one rank needs for ``load``."""
    up, down = load.up_bytes, load.down_bytes
    both = min(up, down)  # bytes that can cross while as many cross the other way: at the rate of both, or in turns
    s_per_byte_up, s_per_byte_down = 1 / rates.h2d_bytes_per_s, 1 / rates.d2h_bytes_per_s
    together = max(s_per_byte_up, s_per_byte_down, 1 / rates.both_bytes_per_s)
    both_s = both * min(together, s_per_byte_up + s_per_byte_down)
    host_memory_bytes = load.cpu_bytes + up * rates.host_bytes_per_h2d_byte + down * rates.host_bytes_per_d2h_byte
    return Bound(
        {
            "link up": both_s + (up - both) * s_per_byte_up,
            "link down": both_s + (down - both) * s_per_byte_down,
            "host memory": host_memory_bytes / rates.host_dram_bytes_per_s,
            "cores": load.host_numel / rates.host_update_params_per_s,
            "device": load.device_numel / rates.device_update_params_per_s,
        }
    )


def load_of_plan(plan: Plan, subgroups: Sequence[Subgroup]) -> Load:
    """What ``plan`` asks of each resource."""
    up = down = cpu = host_numel = device_numel = 0
    for op in plan.ops:
        subgroup = subgroups[op.subgroup]
        match op.kind:
            case OpKind.GRAD_DOWN:
                down += subgroup.down_bytes
            case OpKind.UPDATE_CPU:
                host_numel += subgroup.numel
                cpu += subgroup.host_update_bytes
            case OpKind.UPLOAD:
                up += subgroup.param_bytes
            case OpKind.PREFETCH:
                up += subgroup.state_bytes
            case OpKind.FLUSH:
                down += subgroup.state_bytes
            case OpKind.UPDATE_GPU | OpKind.UPDATE_RESIDENT:
                device_numel += subgroup.numel
    return Load(up, down, cpu, host_numel, device_numel)


def plan_bound(plan: Plan, subgroups: Sequence[Subgroup], rates: Rates) -> Bound:
    """What no schedule of the same placements can beat."""
    return bound_of(load_of_plan(plan, subgroups), rates)


@dataclass(frozen=True, slots=True)
class Update:
    """The update of a model, for bounds over all plans.

    Attributes:
        numel: parameters of the rank whose state is not resident on the device.
        param_bytes: of one parameter, and of its gradient.
        state_bytes: of one parameter's optimizer state.
        gradients_on_host: whether gradients of host updates came down before, in backward.
    """

    numel: float
    param_bytes: float = 2.0
    state_bytes: float = 3.0 * FLOAT32_BYTES
    gradients_on_host: bool = False

    def load(self, device_share: float) -> Load:
        """What updating ``device_share`` of the parameters on the device, streamed, asks of each resource."""
        on_device, on_host = self.numel * device_share, self.numel * (1 - device_share)
        gradients_down = 0.0 if self.gradients_on_host else self.param_bytes
        return Load(
            up_bytes=self.state_bytes * on_device + self.param_bytes * on_host,
            down_bytes=self.state_bytes * on_device + gradients_down * on_host,
            cpu_bytes=2 * (self.state_bytes + self.param_bytes) * on_host,
            host_numel=on_host,
            device_numel=on_device,
        )


def all_host_bound(update: Update, rates: Rates) -> Bound:
    """All on the CPU: with 16-bit parameters and fp32 state ``N * max(32/M, 2/B, 1/U)``.

    30 for 32 where gradients came down before.
    """
    return bound_of(update.load(0.0), rates)


def all_device_bound(update: Update, rates: Rates) -> Bound:
    """All streamed through the device: with fp32 state ``N * max(12/B, 24/M)``."""
    return bound_of(update.load(1.0), rates)


def best_split(update: Update, rates: Rates) -> tuple[float, Bound]:
    """The share of device updates whose bound is lowest, and that bound; of equal shares the smallest.

    In closed form, for links of any two rates: each resource's time is linear in the share, since the direction with
    more bytes is the same for every share. So the longest of them is least at an end or where two of them cross. Where
    cores and one direction of B bytes/s bind, that is ``(B - 2U) / (B + 10U)``, and the bound ``12 N / (B + 10U)``.
    """
    at_none, at_all = (list(bound_of(update.load(share), rates).seconds_of.values()) for share in (0.0, 1.0))
    lines = [(start, end - start) for start, end in zip(at_none, at_all, strict=True)]
    crossings = [
        (start - other) / (other_slope - slope)
        for (start, slope), (other, other_slope) in itertools.combinations(lines, 2)
        if slope != other_slope
    ]
    shares = sorted({0.0, 1.0, *(share for share in crossings if 0 < share < 1)})
    share = min(shares, key=lambda share: max(start + slope * share for start, slope in lines))
    return share, bound_of(update.load(share), rates)
