"""The performance model: a prediction is the very plan, run by the very executor, on virtual lanes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from offload.executor import run_update
from offload.hardware import HardwareProfile
from offload.lanes import Work
from offload.lanes.virtual import VirtualClock, virtual_lanes
from offload.plan import Placement, Plan
from offload.subgroup import Slot, Staging, Subgroup
from offload.timeline import Span


@dataclass(frozen=True, slots=True)
class Rates:
    """What one step costs: link rates in bytes/s each way, update rates in parameters/s, seconds for each copy."""

    h2d_bytes_per_s: float
    d2h_bytes_per_s: float
    host_update_params_per_s: float
    device_update_params_per_s: float
    copy_latency_s: float = 0.0

    @classmethod
    def from_profile(cls, profile: HardwareProfile) -> Rates:
        """Rates of a named machine. Both directions are taken at the rate they reach together."""
        return cls(
            h2d_bytes_per_s=min(profile.h2d_bytes_per_s, profile.both_bytes_per_s),
            d2h_bytes_per_s=min(profile.d2h_bytes_per_s, profile.both_bytes_per_s),
            host_update_params_per_s=profile.host_update_params_per_s,
            device_update_params_per_s=profile.device_update_params_per_s,
            copy_latency_s=profile.copy_latency_s,
        )

    def copy_cost(self, bytes_per_s: float) -> Callable[[Work], float]:
        return lambda work: self.copy_latency_s + work.num_bytes / bytes_per_s if work.num_bytes else 0.0


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds until all lanes are done with one step of ``plan``, and what ran when."""

    plan: Plan
    update_s: float
    spans: tuple[Span, ...]


def predict(plan: Plan, subgroups: Sequence[Subgroup], rates: Rates) -> Prediction:
    """Time one step of ``plan`` from idle lanes until the last flush and upload."""
    clock = VirtualClock()
    costs = {
        "compute": lambda work: work.numel / rates.device_update_params_per_s,
        "host": lambda work: work.numel / rates.host_update_params_per_s,
        "h2d": rates.copy_cost(rates.h2d_bytes_per_s),
        "d2h": rates.copy_cost(rates.d2h_bytes_per_s),
    }
    run_update(
        plan,
        [subgroup.sizes_only() for subgroup in subgroups],
        [Slot(i) for i in range(plan.num_buffers(Placement.DEVICE))],
        [Staging(i) for i in range(plan.num_buffers(Placement.HOST))],
        virtual_lanes(clock, costs),
    )
    spans = tuple(Span(lane, name, start_s, end_s) for lane, name, start_s, end_s in clock.spans)
    return Prediction(plan, max((span.end_s for span in spans), default=0.0), spans)
