"""The measured tables of the authors of Deep Optimizer States, as rows: what was run, what was timed, how long it took.

The file has their form: sections ``phases_MACHINE``, ``static_ratio_MACHINE_MODEL`` and ``micro_batch_MACHINE_MODEL``,
lists of objects whose schedules (``zero3``, ``backward_only``, ``interleaved_kK``) hold seconds; and the stride sweep,
update throughputs by machine, model and stride. ``paper_tables.json`` is the one they published, so any other file may
leave out what it shares with it (models, sizes of subgroups, fixed overheads).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PUBLISHED = Path(__file__).parent / "paper_tables.json"

VOCABULARY = 50304  # GPT-2's byte pairs, padded
SUBGROUP_LIMIT = 100_000_000  # a subgroup is closed by the parameter that brings it to this size
_SWEEP = "stride_sweep_update_throughput_nominal_Bparams_per_s"
_NOT_ROWS = ("_about", "hardware", "models", "subgroup_sizes_per_rank", "fixed_overhead_s", "fitted_constants_per_rank",
             "defects_of_the_published_artifact")  # fmt: skip
_SECTION = re.compile(r"(phases|static_ratio|micro_batch)_([a-z0-9]+)(?:_([0-9.]+B))?")
_SCHEDULE = re.compile(r"(zero3|backward_only|interleaved)(?:_k(\d+))?")
QUANTITIES = ("forward", "backward", "update", "iter")


@dataclass(frozen=True, slots=True)
class Model:
    """A transformer of the tables; ``num_params`` is what it really has, its name is nominal."""

    name: str
    num_layers: int
    hidden: int
    ffn: int
    num_params: int

    def subgroup_numels(self, num_ranks: int) -> list[int]:
        """Sizes of one rank's subgroups: whole parameters, each cut evenly among the ranks, packed in order.

        The width of keys and values, which the tables do not give, follows from the number of parameters.
        """
        h, ffn = self.hidden, self.ffn
        layer_numel = (self.num_params - 2 * VOCABULARY * h) / self.num_layers
        kv_width = 64 * round((layer_numel - 2 * h * h - 3 * h * ffn) / (2 * h) / 64)
        layer = [h, h * h, 2 * h * kv_width, h * h, h, 2 * h * ffn, h * ffn]
        numels, open_numel = [], 0
        for numel in [VOCABULARY * h, *(self.num_layers * layer), h, VOCABULARY * h]:
            open_numel += -(-numel // num_ranks)
            if open_numel >= SUBGROUP_LIMIT:
                numels.append(open_numel)
                open_numel = 0
        return [*numels, open_numel] if open_numel else numels


@dataclass(frozen=True, slots=True)
class Run:
    """One configuration of the artifact.

    Attributes:
        schedule: "zero3", "backward_only" or "interleaved".
        cpu_ratio: share of the subgroups that is not resident on the device.
        update_stride: one of so many subgroups visits the device (interleaved).
    """

    machine: str
    model: str
    schedule: str
    cpu_ratio: float = 1.0
    update_stride: int = 2
    micro_batch: int = 1

    def __post_init__(self) -> None:
        if self.update_stride < 2:
            raise ValueError(
                f"update stride {self.update_stride} is not 2 or more: at most every other subgroup visits"
            )
        if not 0 <= self.cpu_ratio <= 1:
            raise ValueError(f"cpu_ratio {self.cpu_ratio} is no share; it is 0 to 1")

    def __str__(self) -> str:
        stride = f" k={self.update_stride}" if self.schedule == "interleaved" else ""
        ratio = f" cpu {self.cpu_ratio:g}" if self.cpu_ratio != 1 else ""
        batch = f" mbs {self.micro_batch}" if self.micro_batch != 1 else ""
        return f"{self.machine} {self.model} {self.schedule}{stride}{ratio}{batch}"


@dataclass(frozen=True, slots=True)
class Row:
    """One measured time of a run: "forward", "backward", "update", "iter", or "phases", the sum of the first three."""

    run: Run
    quantity: str
    measured_s: float


@dataclass(frozen=True, slots=True)
class Tables:
    rows: tuple[Row, ...]
    models: Mapping[str, Model]
    numels: Mapping[str, list[int]]  # of one rank's subgroups, where published
    overhead_s: Mapping[str, float]  # iteration less its phases, by schedule

    def numels_of(self, model: str, num_ranks: int) -> list[int]:
        return self.numels.get(model) or self.models[model].subgroup_numels(num_ranks)


def read_tables(path: str | Path = PUBLISHED) -> Tables:
    """Rows of ``path``, with models, sizes and overheads from it or else from the published tables.

    Raises:
        ValueError: for a file of another form, naming what is wrong with it.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be an object of sections, got {type(content).__name__}")
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    shared = {key: {**published[key], **content.get(key, {})}
              for key in ("models", "subgroup_sizes_per_rank", "fixed_overhead_s")}  # fmt: skip
    models = {
        name: Model(name, item["layers"], item["hidden"], item["ffn"], round(item["params_real"]))
        for name, item in shared["models"].items()
    }
    try:
        rows = tuple(_rows(content))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: a row is not of the form of {PUBLISHED.name}: {error!r}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if unknown := {row.run.model for row in rows} - models.keys():
        raise ValueError(f"{path}: unknown models {', '.join(sorted(unknown))}; describe them under 'models'")
    overhead_s = {key: value for key, value in shared["fixed_overhead_s"].items() if key != "_about"}
    return Tables(rows, models, shared["subgroup_sizes_per_rank"], {"backward_only": overhead_s["zero3"], **overhead_s})


def _rows(content: Mapping[str, Any]) -> Iterator[Row]:
    for key, section in content.items():
        if key in _NOT_ROWS:
            continue
        if key == _SWEEP:
            yield from _sweep_rows(section)
        elif match := _SECTION.fullmatch(key):
            for item in section:
                yield from _item_rows(item, machine=match[2], model=match[3])
        else:
            raise ValueError(f"unknown section {key!r}; known are phases_*, static_ratio_*, micro_batch_* and {_SWEEP}")


def _item_rows(item: Mapping[str, Any], machine: str, model: str | None) -> Iterator[Row]:
    """Rows of one object: ``{"cpu_ratio": 0.8, "zero3": {"update": 1.79}}`` or ``{"zero3_iter": 7.34}``."""
    run = {"machine": machine, "model": item.get("model", model), "cpu_ratio": item.get("cpu_ratio", 1.0),
           "micro_batch": item.get("micro_batch", 1)}  # fmt: skip
    for key, value in item.items():
        if match := _SCHEDULE.fullmatch(key):
            times = value
        elif match := _SCHEDULE.fullmatch(key.removesuffix("_iter")):
            times = {"iter": value}
        else:
            continue
        configured = Run(**run, schedule=match[1], update_stride=int(match[2] or 2))
        yield from (Row(configured, quantity, times[quantity]) for quantity in QUANTITIES if quantity in times)
        if "iter" not in times and all(phase in times for phase in QUANTITIES[:3]):
            yield Row(configured, "phases", sum(times[phase] for phase in QUANTITIES[:3]))


def _sweep_rows(section: Mapping[str, Any]) -> Iterator[Row]:
    for machine, by_model in section.items():
        if machine == "_about":
            continue
        for model, by_stride in by_model.items():
            nominal_numel = float(model.removesuffix("B")) * 1e9
            for stride, billion_params_per_s in by_stride.items():
                if stride == "zero3":
                    run = Run(machine, model, "zero3")
                else:
                    run = Run(machine, model, "interleaved", update_stride=int(stride))
                yield Row(run, "update", nominal_numel / (billion_params_per_s * 1e9))
