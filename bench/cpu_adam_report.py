"""How bench.cpu_adam shows what it measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.interleaved import Times

LIMIT_BYTES = 28  # of a parameter, read and written by one pass


def print_job(job: str, times: dict[str, Times], numel: int, anchor: str, missing: dict[str, str]) -> None:
    """A table of one job; "x" is how many times as long as ``anchor`` a case takes."""
    print(f"  {job:<34}{'ns/param':>9}{'':>17}{'GB/s of 28 B':>14}{'x':>7}")
    for name, each in times.items():
        ns, (first, third) = each.median_s / numel * 1e9, (edge / numel * 1e9 for edge in each.quartiles_s)
        print(
            f"    {name:<32}{ns:>9.3f}{f'[{first:.3f} {third:.3f}]':>17}{LIMIT_BYTES / ns:>14.1f}"
            f"{each.over(times[anchor]):>7.2f}"
        )
    for name, reason in missing.items():
        if (job == "offload") == ("copy_" in name):
            print(f"    {name:<32}{reason}")


def print_headline(results: dict[str, Any], names: list[str]) -> None:
    print(f"\nat {results['numel']:,} parameters and {results['threads']} threads")
    for name in names:
        value = results[name]
        print(f"  {name:<32}{'not measured' if value is None else f'{value:.3f}'}")
    print(
        f"  {'call_overhead_us':<32}{results['call_overhead_us']:.2f}   (1,000 parameters, the update included; "
        f"unprepared {results['unprepared_call_us']:.1f})"
    )


def plot(results: dict[str, Any], path: Path) -> None:
    """Bars of nanoseconds per parameter, one panel for each job, at the size and threads of the headline."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    chosen = [r for r in results["rows"] if (r["numel"], r["threads"]) == (results["numel"], results["threads"])]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    for axis, job in zip(axes, ("step", "offload"), strict=True):
        rows = [row for row in chosen if row["job"] == job]
        ns = [row["median_s"] / row["numel"] * 1e9 for row in rows]
        edges = [[edge / row["numel"] * 1e9 for edge in row["quartiles_s"]] for row in rows]
        errors = [[value - low for value, (low, _) in zip(ns, edges, strict=True)]]
        errors.append([high - value for value, (_, high) in zip(ns, edges, strict=True)])
        colours = ["tab:blue" if "ours" in row["case"] else "0.4" if "stream" in row["case"] else "0.7" for row in rows]
        bars = axis.barh([row["case"] for row in rows], ns, xerr=errors, color=colours)
        axis.bar_label(bars, fmt="%.2f", padding=3)
        axis.invert_yaxis()
        axis.set(title=job, xlabel="ns per parameter")
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    setting = results["setting"]
    figure.suptitle(
        f"{results['numel']:,} parameters, {results['threads']} threads, {setting['processor']}, "
        f"{setting['instruction_set']}: median and quartiles",
        fontsize=9,
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
