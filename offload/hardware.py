"""What a machine can do: the rates the performance model predicts with, each with its source.

Named profiles ship in ``offload/profiles/``; ``offload calibrate`` measures the machine at hand.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

Basis = Literal["measured", "published", "derived", "assumed"]

_DIRECTORY = Path(__file__).parent / "profiles"


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of a profile and how far to trust it.

    ``basis``: *measured* on such a machine by this project; *published* by somebody who measured or specified it;
    *derived* from other figures, as ``source`` says; *assumed* otherwise. ``source`` says where it comes from.
    """

    value: float
    basis: Basis
    source: str

    def __post_init__(self) -> None:
        if self.basis not in get_args(Basis):
            raise ValueError(f"basis must be one of {', '.join(get_args(Basis))}, got {self.basis!r}")
        if not isinstance(self.source, str) or not self.source.strip():
            raise ValueError(f"source of the value {self.value!r} is empty; say where the number comes from")


@dataclass(frozen=True)
class HardwareProfile:
    """The rates of one machine, as one of its ranks (processes with a device of their own) sees them while all work.

    An update is one Adam step on fp32 state with 16-bit gradients and parameters, in one fused pass: 28 bytes of memory
    traffic a parameter. Make a profile with :meth:`load`, :meth:`from_figures` or :meth:`with_figures`; ``figures``
    holds the numbers again, with their origin.
    """

    name: str
    description: str
    h2d_bytes_per_s: float  # pinned host memory to the device, this direction alone
    d2h_bytes_per_s: float  # device to pinned host memory, this direction alone
    both_bytes_per_s: float  # each way while both directions are busy, host memory permitting
    host_bytes_per_h2d_byte: float  # host memory traffic that a byte copied to the device takes from everything else
    host_bytes_per_d2h_byte: float  # the same for a byte copied from the device
    copy_latency_s: float  # added to every copy
    launch_latency_s: float  # added to every kernel
    host_dram_bytes_per_s: float  # reads and writes together, this rank's share
    host_update_params_per_s: float  # by this rank's cores, from its share of host memory, without copies beside
    host_update_split16_params_per_s: float  # the same with 16-bit master remainders, bf16 moments, 8-bit moments
    host_update_bf16_params_per_s: float
    host_update_int8_params_per_s: float
    blocking_upcast_params_per_s: float  # 16-bit on the device to fp32 on the host, blocking: converted by the CPU
    blocking_downcast_params_per_s: float  # fp32 on the host to 16-bit on the device, blocking: converted by the CPU
    device_update_params_per_s: float  # state and gradients in device memory
    device_memory_bytes: int
    device_memory_bytes_per_s: float
    device_flops: float  # sustained by a transformer's forward and backward in bf16, per second
    forward_layer_latency_s: float  # added to each layer's forward: launches, hooks, gathering that nothing hides
    backward_layer_latency_s: float  # added to each layer's backward
    num_ranks_per_node: int
    figures: Mapping[str, Figure] = field(repr=False, hash=False)

    def __post_init__(self) -> None:
        for key in _NUMBERS:
            value = getattr(self, key)
            self._check(key, value)
            if self.figures[key].value != value:
                raise ValueError(
                    f"{key} is {value!r} without a source; change numbers by with_figures({key}=Figure(...))"
                )
        slower = min(self.h2d_bytes_per_s, self.d2h_bytes_per_s)
        if self.both_bytes_per_s > slower:
            raise ValueError(
                f"profile {self.name!r}: both_bytes_per_s is {self.both_bytes_per_s:g}, more than the slower direction "
                f"has alone ({slower:g}); it is the rate each way while both are busy, so give at most that"
            )

    def _check(self, key: str, value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            wanted = "a number"
        elif key in _WHOLE_NUMBERS and (not isinstance(value, int) or value < 1):
            wanted = "a whole number from 1 upward"
        elif key in _LATENCIES and not 0 <= value < math.inf:
            wanted = "0 or a positive finite number of seconds"
        elif key not in _LATENCIES and not 0 < value < math.inf:
            wanted = "a positive finite number"
        else:
            return
        raise ValueError(f"profile {self.name!r}: {key} is {value!r}; give {wanted}")

    @property
    def duplex_factor(self) -> float:
        """Share of the slower direction's rate that each direction keeps while both are busy: 1 is full duplex."""
        return self.both_bytes_per_s / min(self.h2d_bytes_per_s, self.d2h_bytes_per_s)

    def host_update_rate(self, state_format: str) -> float:
        """Parameters/s of the CPU update with optimizer state in ``state_format``; ValueError if it is unknown."""
        if state_format not in _RATE_OF_FORMAT:
            raise ValueError(f"state_format={state_format!r} is unknown; known are {', '.join(_RATE_OF_FORMAT)}")
        rate: float = getattr(self, _RATE_OF_FORMAT[state_format])
        return rate

    def share_of(self, num_ranks: int) -> float:
        """What a rank has of cores and host memory with ``num_ranks`` at work, over what it has with all of them."""
        if not 1 <= num_ranks <= self.num_ranks_per_node:
            raise ValueError(
                f"num_ranks={num_ranks} is not between 1 and the {self.num_ranks_per_node} that share a node of "
                f"profile {self.name!r}; more ranks take more nodes, each with its own"
            )
        return self.num_ranks_per_node / num_ranks

    @classmethod
    def names(cls) -> list[str]:
        """The shipped profiles."""
        return sorted(path.stem for path in _DIRECTORY.glob("*.json"))

    @classmethod
    def load(cls, name_or_path: str | PathLike[str]) -> HardwareProfile:
        """A shipped profile by name, or one from a JSON file written by :meth:`save`.

        Raises ValueError for an unknown name, a file that is no profile, and values out of range.
        """
        path = Path(name_or_path)
        if name_or_path in cls.names():
            path = _DIRECTORY / f"{name_or_path}.json"
        elif not path.is_file():
            raise ValueError(
                f"no hardware profile {str(name_or_path)!r}: give the path of a profile file, or one of the shipped "
                f"names {', '.join(cls.names())}"
            )
        try:
            return _from_json(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_figures(cls, name: str, description: str, figures: Mapping[str, Figure]) -> HardwareProfile:
        """A profile of these numbers; ValueError if a field is missing, unknown or out of range."""
        _check_keys(figures, _NUMBERS, f"profile {name!r}")
        numbers: dict[str, Any] = {key: figures[key].value for key in _NUMBERS}
        return cls(name=name, description=description, figures=figures, **numbers)

    def with_figures(self, **figures: Figure) -> HardwareProfile:
        """This profile with some numbers, and their sources, replaced; for rates measured while running."""
        return self.from_figures(self.name, self.description, {**self.figures, **figures})

    def save(self, path: str | PathLike[str]) -> None:
        """Write the profile as JSON, for :meth:`load`."""
        figures = {key: asdict(self.figures[key]) for key in _NUMBERS}
        content = {"name": self.name, "description": self.description, "figures": figures}
        Path(path).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def describe(self) -> str:
        """Every number with its basis and source, as text."""
        width = max(map(len, _NUMBERS))
        lines = [f"{self.name}: {self.description}"]
        for key in _NUMBERS:
            figure = self.figures[key]
            lines.append(f"  {key:<{width}}  {figure.value:<10.4g}  {figure.basis:<9}  {figure.source}")
        return "\n".join(lines)


_NUMBERS = tuple(item.name for item in fields(HardwareProfile) if item.type in ("float", "int"))
_WHOLE_NUMBERS = ("device_memory_bytes", "num_ranks_per_node")
_LATENCIES = tuple(key for key in _NUMBERS if key.endswith("latency_s"))
_RATE_OF_FORMAT = {
    "fp32": "host_update_params_per_s",
    "split16": "host_update_split16_params_per_s",
    "bf16": "host_update_bf16_params_per_s",
    "int8": "host_update_int8_params_per_s",
}


def _from_json(content: Any) -> HardwareProfile:
    """The profile in parsed JSON: {"name", "description", "figures": {field: {"value", "basis", "source"}}}."""
    _check_keys(content, ("name", "description", "figures"), "a profile")
    _check_keys(content["figures"], _NUMBERS, "its figures")
    figures = {}
    for key, item in content["figures"].items():
        _check_keys(item, ("value", "basis", "source"), f"figure {key}")
        try:
            figures[key] = Figure(**item)
        except ValueError as error:
            raise ValueError(f"figure {key}: {error}") from error
    return HardwareProfile.from_figures(content["name"], content["description"], figures)


def _check_keys(given: Any, wanted: Collection[str], what: str) -> None:
    if not isinstance(given, Mapping):
        raise ValueError(f"{what} must be an object with the fields {', '.join(wanted)}, got {given!r}")
    if missing := [key for key in wanted if key not in given]:
        raise ValueError(f"{what} lacks {', '.join(missing)}; add each with value, basis and source, or calibrate")
    if unknown := [key for key in given if key not in wanted]:
        raise ValueError(f"{what} has unknown fields {', '.join(unknown)}; known are {', '.join(wanted)}")
