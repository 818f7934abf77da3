"""What the microbenchmarks found: one record a case, as JSON and CSV, and two runs compared."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from offload.pool import format_bytes

SCHEMA = 1
NOTICEABLE = 0.05  # relative change that a comparison points out
_SCALES = {"bytes/s": (1e9, "GB/s"), "parameters/s": (1e9, "Gparam/s"), "FLOP/s": (1e12, "TFLOP/s")}


@dataclass(frozen=True, slots=True)
class Result:
    """One case.

    Attributes:
        group: what it belongs to: "copy", "duplex", "streams", "batch", "overlap", "update", "place", "cost", "ranks".
        source, target, mode: what is copied or done where, and beside what; together with ``num_bytes`` its name.
        value: the median, in ``unit``.
        low, high: quartiles, the value itself where there are no repeats.
        num_bytes: of one copy, where the case is about one size.
        details: further figures, each with its unit in its name.
        problem: why the value is not to be trusted; empty if it is.
    """

    group: str
    source: str
    target: str
    mode: str
    value: float
    unit: str
    low: float
    high: float
    num_bytes: int | None = None
    details: Mapping[str, float] = field(default_factory=dict)
    problem: str = ""

    @property
    def name(self) -> str:
        """As "pinned_to_device.alone.64.0MiB"."""
        size = "" if self.num_bytes is None else "." + format_bytes(self.num_bytes).replace(" ", "")
        return f"{self.source}_to_{self.target}.{self.mode}{size}".replace(" ", "_")

    @property
    def spread(self) -> str:
        """The quartiles for a reader, relative to the value."""
        if self.unit == "share" or not self.value:
            return f"{self.low:.0%} to {self.high:.0%}" if self.unit == "share" else ""
        return f"{self.low / self.value - 1:+.0%} {self.high / self.value - 1:+.0%}"

    @property
    def text(self) -> str:
        """The value for a reader."""
        return format_value(self.value, self.unit)


def format_value(value: float, unit: str) -> str:
    """A figure with its unit, for a reader: GB/s, microseconds, percent."""
    if unit == "s":
        return f"{value * 1e6:,.1f} us" if value < 1e-2 else f"{value * 1e3:,.1f} ms"
    if unit == "share":
        return f"{value:.0%}"
    scale, label = _SCALES[unit]
    return f"{value / scale:.3g} {label}"


@dataclass(frozen=True, slots=True)
class Report:
    """A whole run.

    Attributes:
        machine: what it ran on, by name.
        settings: what was asked for.
        results: in the order they were measured.
        figures: what follows from them: rates of the performance model, fitted latencies.
        step: an optimizer step that was measured: its spans, its shares and times; empty if none was.
    """

    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    results: Sequence[Result]
    figures: Mapping[str, float] = field(default_factory=dict)
    step: Mapping[str, Any] = field(default_factory=dict)

    def group(self, name: str) -> list[Result]:
        return [result for result in self.results if result.group == name]

    def find(self, name: str) -> Result:
        """The case of that name; KeyError if there is none."""
        for result in self.results:
            if result.name == name:
                return result
        raise KeyError(name)

    def problems(self) -> list[str]:
        return [f"{result.name}: {result.problem}" for result in self.results if result.problem]

    def save(self, path: str | Path) -> None:
        """Write JSON, for :meth:`load`."""
        content = {
            "schema": SCHEMA, "machine": dict(self.machine), "settings": dict(self.settings),
            "figures": dict(self.figures), "step": dict(self.step),
            "results": [{"name": result.name, **asdict(result)} for result in self.results],
        }  # fmt: skip
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read what :meth:`save` wrote; ValueError for anything else."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA:
                raise ValueError(f"schema {content['schema']!r}, and this version reads {SCHEMA}")
            rows = [{key: value for key, value in row.items() if key != "name"} for row in content["results"]]
            results = [Result(**row) for row in rows]
            return cls(content["machine"], content["settings"], results, content["figures"], content["step"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not what `offload bench --json` writes: {error}") from error

    def as_csv(self) -> str:
        """A line a case; details in columns of their own."""
        details = sorted({key for result in self.results for key in result.details})
        columns = ["name", "group", "source", "target", "mode", "num_bytes", "value", "unit", "low", "high", "problem"]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*columns, *details])
        for result in self.results:
            row = ["" if (value := getattr(result, key)) is None else value for key in columns]
            writer.writerow([*row, *(result.details.get(key, "") for key in details)])
        return text.getvalue()


@dataclass(frozen=True, slots=True)
class Change:
    """One case in two runs. ``gain`` is above 0 where the second is better: faster, or less time."""

    name: str
    before: Result
    after: Result

    @property
    def gain(self) -> float:
        if not self.before.value or not self.after.value:
            return 0.0
        ratio = self.after.value / self.before.value
        return (1 / ratio if self.before.unit == "s" else ratio) - 1

    @property
    def is_noticeable(self) -> bool:
        """More than 5 %, and more than the quartiles of the two runs overlap."""
        apart = self.after.low > self.before.high or self.after.high < self.before.low
        return abs(self.gain) > NOTICEABLE and apart


def compare(before: Report, after: Report) -> list[Change]:
    """Cases that both runs have, those that became worse first.

    Raises:
        ValueError: if there is none.
    """
    known = {result.name: result for result in before.results}
    changes = [Change(each.name, known[each.name], each) for each in after.results if each.name in known]
    if not changes:
        raise ValueError("the two runs have no case in common: were they made with other sizes or devices?")
    return sorted(changes, key=lambda change: change.gain)
