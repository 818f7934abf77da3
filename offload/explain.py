"""The layout, the plan and the bill of a runtime, as text."""

from __future__ import annotations

from offload.plan import Placement
from offload.pool import format_bytes
from offload.runtime import Runtime

_WHERE = {
    Placement.HOST: "CPU",
    Placement.DEVICE: "device, state streamed",
    Placement.RESIDENT: "device, state resident",
}


def explain(runtime: Runtime) -> str:
    """Which subgroup is updated where, what the runtime takes, and what the measured rates predict."""
    placements = runtime.plan.placements
    numel = sum(subgroup.numel for subgroup in runtime.subgroups)
    lines = [
        f"{len(runtime.subgroups)} subgroups, {numel:,} parameters on {runtime.device}",
        f"{'subgroup':>8}  {'parameters':>12}  {'dtype':<8}  {'state':>10}  updated on",
    ]
    for subgroup, actions in zip(runtime.subgroups, runtime.actions, strict=True):
        dtype = str(actions.dtype).removeprefix("torch.")
        lines.append(
            f"{subgroup.index:>8}  {subgroup.numel:>12,}  {dtype:<8}  {format_bytes(subgroup.state_bytes):>10}  "
            f"{_WHERE[placements[subgroup.index]]}"
        )
    lines += [f"memory: {runtime.bill}", f"plan: {runtime.plan}"]
    if runtime.rates is not None:
        rates = runtime.rates
        lines.append(
            f"measured: H2D {rates.h2d_bytes_per_s / 1e9:.2f} GB/s, D2H {rates.d2h_bytes_per_s / 1e9:.2f} GB/s, "
            f"CPU update {rates.host_update_params_per_s / 1e9:.3f} and device update "
            f"{rates.device_update_params_per_s / 1e9:.3f} billion parameters/s; "
            f"predicted update {runtime.simulate(rates).update_s * 1e3:.2f} ms"
        )
    return "\n".join(lines)
