"""The measured tables of Deep Optimizer States (arXiv 2410.21316) beside our simulation.

    python -m bench.reproduce_paper [--rows FILE] [--json FILE]

Every row of a machine is simulated with the same profile (``dos-h100``, ``dos-a100``); nothing is fitted per row.
``--rows FILE`` takes other rows in the form of ``paper_tables.json``, ``--json FILE`` writes rows and errors.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.paper_artifact import Times, simulate
from bench.paper_tables import PUBLISHED, Row, Tables, read_tables
from offload._table import format_table
from offload.hardware import HardwareProfile

PROFILE_OF = {"h100": "dos-h100", "a100": "dos-a100"}
MISS = 0.10  # an error beyond which a row is explained
SUMMARIES = {"update": ("update",), "iter": ("iter", "phases"), "forward": ("forward",), "backward": ("backward",)}

# Causes that are known, of rows that the profile makes too short (-1) or too long (1).
_WHY_INTERLEAVED_FORWARD = (
    "the measured forward of interleaved runs is longer than that of ZeRO-3 by 0.04 to 0.17 s, and most for the "
    "smallest model; most likely what still runs when the artifact's step returns delays the first layers. The "
    "simulated forward is that of ZeRO-3"
)
_WHY_10B_BACKWARD = (
    "less arithmetic and plain copies, blocking conversions took 0.79 ns a parameter in this run and 0.95 to 0.99 in "
    "all others; the profile has one rate, 0.95"
)
WHY = {
    ("h100 7B interleaved k=2", "forward", -1): _WHY_INTERLEAVED_FORWARD,
    ("h100 10B interleaved k=2", "forward", -1): _WHY_INTERLEAVED_FORWARD,
    ("h100 7B interleaved k=2", "phases", -1): "all of it is the forward: " + _WHY_INTERLEAVED_FORWARD,
    ("h100 10B zero3", "backward", 1): _WHY_10B_BACKWARD,
    ("h100 10B zero3", "phases", 1): "all of it is the backward: " + _WHY_10B_BACKWARD,
}


@dataclass(frozen=True, slots=True)
class Comparison:
    row: Row
    times: Times

    @property
    def simulated_s(self) -> float:
        seconds: float = getattr(self.times, self.row.quantity)
        return seconds

    @property
    def error(self) -> float:
        """Relative: 0.05 is 5 % too slow."""
        return self.simulated_s / self.row.measured_s - 1

    def explanation(self, beside: Sequence[Comparison] = ()) -> str:
        """Why a row that misses by more than :data:`MISS` does so, as far as it is known: the cause, or the phase.

        Args:
            beside: what else was measured of the same run.
        """
        row = self.row
        if known := WHY.get((str(row.run), row.quantity, 1 if self.error > 0 else -1)):
            return known
        apart_s = self.simulated_s - row.measured_s
        if parts := [c for c in beside if c.row.quantity in ("forward", "backward", "update")]:
            most = max(parts, key=lambda c: abs(c.simulated_s - c.row.measured_s))
            if row.quantity in ("iter", "phases"):
                return f"of {apart_s:+.3f} s, {most.simulated_s - most.row.measured_s:+.3f} s are {most.row.quantity}"
        return f"cause not known; {apart_s:+.3f} s, simulated as {self._simulated_of()}"

    def _simulated_of(self) -> str:
        """What the simulated seconds consist of."""
        profile, times, quantity = HardwareProfile.load(PROFILE_OF[self.row.run.machine]), self.times, self.row.quantity
        match quantity:
            case "forward" | "backward":
                latency_ms = getattr(profile, f"{quantity}_layer_latency_s") * 1e3
                what = f"arithmetic at {profile.device_flops / 1e12:.0f} TFLOP/s and {latency_ms:.2f} ms a layer"
                if quantity == "backward" and self.row.run.schedule == "zero3":
                    what += f", conversions at {profile.blocking_upcast_params_per_s / 1e9:.2f} billion parameters/s"
                return what
            case "update":
                return (
                    f"CPU updates at {profile.host_update_params_per_s / 1e9:.2f} billion parameters/s, within "
                    f"{profile.host_dram_bytes_per_s / 1e9:.0f} GB/s of host memory"
                )
            case _:
                return (
                    f"forward {times.forward:.3f}, backward {times.backward:.3f}, update {times.update:.3f} "
                    f"and {times.overhead:.2f} s between them"
                )


def compare(tables: Tables) -> list[Comparison]:
    """Simulate every row of ``tables``. Raises ValueError for a machine without a profile."""
    if unknown := {row.run.machine for row in tables.rows} - PROFILE_OF.keys():
        raise ValueError(f"no profile for the machines {', '.join(sorted(unknown))}; known are {', '.join(PROFILE_OF)}")
    profiles = {machine: HardwareProfile.load(name) for machine, name in PROFILE_OF.items()}
    times = {run: simulate(run, profiles[run.machine], tables) for run in {row.run for row in tables.rows}}
    return [Comparison(row, times[row.run]) for row in tables.rows]


def summarize(comparisons: Iterable[Comparison]) -> dict[str, float | int]:
    """``update_rms``, ``update_worst``, ``iter_rms`` …: relative errors by quantity, and how many rows each is of.

    An iteration is one that was measured whole, or the sum of three phases measured each.
    """
    errors: defaultdict[str, list[float]] = defaultdict(list)
    for comparison in comparisons:
        errors[comparison.row.quantity].append(comparison.error)
    summary: dict[str, float | int] = {}
    for name, quantities in SUMMARIES.items():
        if found := [error for quantity in quantities for error in errors[quantity]]:
            summary[f"{name}_rms"] = math.sqrt(math.fsum(error**2 for error in found) / len(found))
            summary[f"{name}_worst"] = max(map(abs, found))
            summary[f"{name}_rows"] = len(found)
    return summary


def report(comparisons: Sequence[Comparison]) -> str:
    """The rows as a table, the errors in short, and an explanation of every miss."""
    rows = [("run", "quantity", "measured s", "simulated s", "error")]
    rows += [
        (str(c.row.run), c.row.quantity, f"{c.row.measured_s:.3f}", f"{c.simulated_s:.3f}", f"{c.error:+.1%}")
        for c in comparisons
    ]
    summary = summarize(comparisons)
    lines = [format_table(rows), ""]
    for name in SUMMARIES:
        if f"{name}_rms" in summary:
            rms, worst, num_rows = (summary[f"{name}_{key}"] for key in ("rms", "worst", "rows"))
            lines.append(f"{name}: rms {rms:.1%}, worst {worst:.1%}, {num_rows} rows")
    misses = [c for c in comparisons if abs(c.error) > MISS]
    lines += ["", f"Rows that miss by more than {MISS:.0%}:" if misses else f"No row misses by more than {MISS:.0%}."]
    for c in misses:
        lines.append(f"- {c.row.run}, {c.row.quantity} ({c.error:+.1%}): {c.explanation(_beside(c, comparisons))}.")
    return "\n".join(lines)


def _beside(comparison: Comparison, comparisons: Iterable[Comparison]) -> list[Comparison]:
    return [c for c in comparisons if c.row.run == comparison.row.run and c.row.quantity != comparison.row.quantity]


def as_json(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    rows = [
        {
            "machine": c.row.run.machine, "profile": PROFILE_OF[c.row.run.machine], "model": c.row.run.model,
            "schedule": c.row.run.schedule, "update_stride": c.row.run.update_stride,
            "cpu_ratio": c.row.run.cpu_ratio, "micro_batch": c.row.run.micro_batch, "ranks": c.row.run.num_ranks,
            "sequence": c.row.run.sequence, "subgroup_size": c.row.run.subgroup_size, "quantity": c.row.quantity,
            "measured_s": c.row.measured_s, "simulated_s": c.simulated_s, "error": c.error,
            **({"explanation": c.explanation(_beside(c, comparisons))} if abs(c.error) > MISS else {}),
        }
        for c in comparisons
    ]  # fmt: skip
    return {**summarize(comparisons), "rows": rows}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.reproduce_paper", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--rows", metavar="FILE", type=Path, default=PUBLISHED, help="other measured rows")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write rows and errors to FILE")
    options = parser.parse_args(arguments)
    try:
        comparisons = compare(read_tables(options.rows))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report(comparisons))
    if options.json is not None:
        options.json.write_text(json.dumps(as_json(comparisons), indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
