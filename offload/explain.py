"""The layout, the plan and the bill of a runtime, as text."""

from __future__ import annotations

from collections.abc import Sequence

from offload.controller import Decision
from offload.plan import Placement
from offload.pool import format_bytes
from offload.runtime import Runtime

MAX_DECISIONS = 8  # that are explained, the last ones

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
    if runtime.in_force.rates is not None:
        rates = runtime.in_force.rates
        lines.append(
            f"measured: H2D {rates.h2d_bytes_per_s / 1e9:.2f} GB/s, D2H {rates.d2h_bytes_per_s / 1e9:.2f} GB/s, "
            f"CPU update {rates.host_update_params_per_s / 1e9:.3f} and device update "
            f"{rates.device_update_params_per_s / 1e9:.3f} billion parameters/s; "
            f"predicted update {runtime.simulate(rates).update_s * 1e3:.2f} ms"
        )
    if runtime.options.chooses_overlap:
        lines.append(_overlap(runtime))
    lines += explain_decisions(runtime.in_force.decisions)
    return "\n".join(lines)


def _overlap(runtime: Runtime) -> str:
    """How the update hides, where ``overlap="auto"``, and why."""
    step_s = runtime.in_force.decisions[-1].step_s if runtime.in_force.decisions else {}
    if not step_s:
        return f"overlap: {runtime.overlap}, until the times of forward and backward are known"
    times = [f"{seconds * 1e3:.2f} ms with {overlap}" for overlap, seconds in step_s.items()]
    return f"overlap: {runtime.overlap}; a step is predicted to take {', '.join(times)}"


def explain_decisions(decisions: Sequence[Decision]) -> list[str]:
    """What was measured, predicted and decided, a line each; the last of many."""
    lines = []
    if len(decisions) > MAX_DECISIONS:
        lines.append(f"{len(decisions) - MAX_DECISIONS} decisions before these")
    for decision in decisions[-MAX_DECISIONS:]:
        measured_s, predicted_s = decision.measurement.update_s, decision.predicted_s
        before = "" if predicted_s is None else f" (predicted {predicted_s * 1e3:.2f} ms, {decision.error:+.0%})"
        lines.append(f"step {decision.measurement.step}: update {measured_s * 1e3:.2f} ms{before}; {_why(decision)}")
    return lines


def _why(decision: Decision) -> str:
    gain = decision.current_s / decision.target_s - 1
    match decision.action:
        case "kept":
            return f"kept the plan: the best share would gain {gain:.1%}, not worth a change"
        case "reordered":
            return f"reordered operations: a gain of {gain:.1%} by prediction"
        case "moved":
            return f"moved subgroups {list(decision.moved)} to the other side: the best share gains {gain:.1%}"
        case "returned":
            return f"moved subgroups {list(decision.moved)} back: a share was measured to be shorter"
        case "probed":
            return f"moved subgroups {list(decision.moved)}, to measure what was not measured (for long)"
