"""The measured tables of the authors of Deep Optimizer States, as rows: what was run, what was timed, how long it took.

The file has their form: sections ``phases_MACHINE``, ``static_ratio_MACHINE_MODEL`` and ``micro_batch_MACHINE_MODEL``,
lists of objects whose schedules (``zero3``, ``backward_only``, ``interleaved_kK``) hold seconds; and the stride sweep,
update throughputs by machine, model and stride. Beside ``model``, ``cpu_ratio`` and ``micro_batch``, an object may say
what differs from the runs of the tables: ``gpus``, ``sequence``, ``subgroup_size``, ``activation_checkpointing``.
``paper_tables.json`` is the one they published, so any other file may leave out what it shares with it (models, sizes
of subgroups, fixed overheads).
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
NUM_RANKS = 4  # of the runs in the tables, as their sequence and size of subgroups below
SEQUENCE = 2048
SUBGROUP_SIZE = 100_000_000  # a subgroup is closed by the parameter that brings it to this size
SWEEP = "stride_sweep_update_throughput_nominal_Bparams_per_s"
_NOT_ROWS = ("_about", "hardware", "models", "subgroup_sizes_per_rank", "fixed_overhead_s", "fitted_constants_per_rank",
             "defects_of_the_published_artifact")  # fmt: skip
_SECTION = re.compile(r"(phases|static_ratio|micro_batch)_([a-z0-9]+)(?:_(.+))?")
_NOMINAL = re.compile(r"([0-9.]+)B")
_SCHEDULE = re.compile(r"(zero3|backward_only|interleaved)(?:_k(\d+))?")
QUANTITIES = ("forward", "backward", "update", "iter")
# Keys of an object, and what they are of a run; a key that starts with "_" is a remark.
_OPTIONS = {
    "model": "model", "cpu_ratio": "cpu_ratio", "micro_batch": "micro_batch", "gpus": "num_ranks", "ranks": "num_ranks",
    "sequence": "sequence", "subgroup_size": "subgroup_size", "activation_checkpointing": "recompute",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Model:
    """A transformer of the tables; ``num_params`` is what it really has, its name is nominal."""

    name: str
    num_layers: int
    hidden: int
    ffn: int
    num_params: int

    def subgroup_numels(self, num_ranks: int = NUM_RANKS, subgroup_size: int = SUBGROUP_SIZE) -> list[int]:
        """Sizes of one rank's subgroups: whole parameters, each cut evenly among the ranks, packed in order.

        The width of keys and values, which the tables do not give, follows from the number of parameters; where none
        are left for them, the MLP has two matrices instead of three.
        """
        h, ffn = self.hidden, self.ffn
        layer_numel = (self.num_params - 2 * VOCABULARY * h) / self.num_layers
        for num_into_mlp in (2, 1):
            kv_width = 64 * round((layer_numel - 2 * h * h - (num_into_mlp + 1) * h * ffn) / (2 * h) / 64)
            if kv_width > 0:
                break
        else:
            raise ValueError(
                f"model {self.name}: {self.num_params:,} parameters are too few for {self.num_layers} layers of width "
                f"{h} and {ffn}; correct them, or give its subgroup_sizes_per_rank"
            )
        layer = [h, h * h, 2 * h * kv_width, h * h, h, num_into_mlp * h * ffn, h * ffn]
        numels, open_numel = [], 0
        for numel in [VOCABULARY * h, *(self.num_layers * layer), h, VOCABULARY * h]:
            open_numel += -(-numel // num_ranks)
            if open_numel >= subgroup_size:
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
        sequence: tokens of each of a rank's ``micro_batch`` sequences.
        recompute: forward is done again in backward (activation checkpointing).
    """

    machine: str
    model: str
    schedule: str
    cpu_ratio: float = 1.0
    update_stride: int = 2
    micro_batch: int = 1
    num_ranks: int = NUM_RANKS
    sequence: int = SEQUENCE
    subgroup_size: int = SUBGROUP_SIZE
    recompute: bool = True

    def __post_init__(self) -> None:
        if self.update_stride < 2:
            raise ValueError(
                f"update stride {self.update_stride} is not 2 or more: at most every other subgroup visits"
            )
        if not 0 <= self.cpu_ratio <= 1:
            raise ValueError(f"cpu_ratio {self.cpu_ratio} is no share; it is 0 to 1")
        for key in ("micro_batch", "num_ranks", "sequence", "subgroup_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} {getattr(self, key)} is not possible; it is 1 or more")

    def __str__(self) -> str:
        stride = f" k={self.update_stride}" if self.schedule == "interleaved" else ""
        ratio = f" cpu {self.cpu_ratio:g}" if self.cpu_ratio != 1 else ""
        batch = f" mbs {self.micro_batch}" if self.micro_batch != 1 else ""
        ranks = f" {self.num_ranks} ranks" if self.num_ranks != NUM_RANKS else ""
        sequence = f" seq {self.sequence}" if self.sequence != SEQUENCE else ""
        size = f" subgroups {self.subgroup_size / 1e6:g}M" if self.subgroup_size != SUBGROUP_SIZE else ""
        kept = "" if self.recompute else " no recomputation"
        return f"{self.machine} {self.model} {self.schedule}{stride}{ratio}{batch}{ranks}{sequence}{size}{kept}"


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

    def numels_of(self, model: str, num_ranks: int = NUM_RANKS, subgroup_size: int = SUBGROUP_SIZE) -> list[int]:
        """Sizes of one rank's subgroups: as published, where they were, or else as the artifact packs them."""
        published = self.numels.get(model) if (num_ranks, subgroup_size) == (NUM_RANKS, SUBGROUP_SIZE) else None
        return published or self.models[model].subgroup_numels(num_ranks, subgroup_size)


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
        if key == SWEEP:
            yield from _sweep_rows(section)
        elif match := _SECTION.fullmatch(key):
            for item in section:
                yield from _item_rows(item, machine=match[2], model=match[3])
        else:
            raise ValueError(f"unknown section {key!r}; known are phases_*, static_ratio_*, micro_batch_* and {SWEEP}")


def _item_rows(item: Mapping[str, Any], machine: str, model: str | None) -> Iterator[Row]:
    """Rows of one object: ``{"cpu_ratio": 0.8, "zero3": {"update": 1.79}}`` or ``{"zero3_iter": 7.34}``."""
    run: dict[str, Any] = {"machine": machine, "model": model}
    run |= {_OPTIONS[key]: value for key, value in item.items() if key in _OPTIONS}
    for key, value in item.items():
        if key in _OPTIONS or key.startswith("_"):
            continue
        if match := _SCHEDULE.fullmatch(key):
            times = value
        elif match := _SCHEDULE.fullmatch(key.removesuffix("_iter")):
            times = {"iter": value}
        else:
            known = ", ".join(_OPTIONS)
            raise ValueError(f"{key!r} of a row of {machine} is neither a schedule nor one of {known}")
        configured = Run(**run, schedule=match[1], update_stride=int(match[2] or 2))
        yield from (Row(configured, quantity, times[quantity]) for quantity in QUANTITIES if quantity in times)
        if "iter" not in times and all(phase in times for phase in QUANTITIES[:3]):
            yield Row(configured, "phases", sum(times[phase] for phase in QUANTITIES[:3]))


def _sweep_rows(section: Mapping[str, Any]) -> Iterator[Row]:
    for machine, by_model in section.items():
        if machine == "_about":
            continue
        for model, by_stride in by_model.items():
            if not (nominal := _NOMINAL.fullmatch(model)):
                raise ValueError(f"{model!r} of {SWEEP} names no number of parameters; a model there is named as 20B")
            nominal_numel = float(nominal[1]) * 1e9
            for stride, billion_params_per_s in by_stride.items():
                if match := _SCHEDULE.fullmatch(stride):
                    run = Run(machine, model, match[1], update_stride=int(match[2] or 2))
                else:
                    run = Run(machine, model, "interleaved", update_stride=int(stride))
                yield Row(run, "update", nominal_numel / (billion_params_per_s * 1e9))
