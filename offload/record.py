"""One measured step with all that explains it, in a file that Perfetto opens and ``offload explain`` reads."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offload.accelerators import Accelerator
from offload.facts import HostFacts, ProcessorMeter, host_facts
from offload.homes import Homes
from offload.perf_model import Rates
from offload.plan import Placement, Plan
from offload.pool import Budgets
from offload.runtime import Runtime
from offload.subgroup import Subgroup
from offload.timeline import Span, chrome_trace

_KEY = "offload"  # in the trace's otherData, which viewers show and do not interpret


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A measured step.

    Attributes:
        spans: what ran when, in seconds.
        sizes: (numel, param_bytes, state_bytes) of each subgroup.
        homes: where states live, and how many buffers there are.
        policy: the plan that the user asked for, as text: "auto", "host", "Stride(update_stride=2)", ...
        asked_slots: ``num_slots`` of the user, or None.
        budgets: of the user.
        expected: rates that were believed before anything was measured; None without a profile.
        pageable_bytes: of host buffers that cross the link and are not pinned.
        facts: the host around the step.
        model_s: seconds of forward and backward before the update; 0 if that is unknown.
        overlap: what of the update runs beside forward and backward; "none" where it begins after backward.
    """

    spans: tuple[Span, ...]
    plan: Plan
    sizes: tuple[tuple[int, int, int], ...]
    homes: Homes
    policy: str
    asked_slots: int | None
    budgets: Budgets
    expected: Rates | None
    pageable_bytes: int
    facts: HostFacts
    model_s: float = 0.0
    overlap: str = "none"

    @property
    def subgroups(self) -> list[Subgroup]:
        return [Subgroup(i, *sizes) for i, sizes in enumerate(self.sizes)]

    def save(self, path: str | PathLike[str]) -> None:
        """Write a Chrome trace with the rest of the record beside the events."""
        content = chrome_trace(self.spans)
        content["otherData"] = {_KEY: json.dumps(self._as_dict())}
        Path(path).write_text(json.dumps(content), encoding="utf-8")

    def _as_dict(self) -> dict[str, Any]:
        homes = {
            **asdict(self.homes),
            "residents": sorted(self.homes.residents),
            "visitors": sorted(self.homes.visitors),
            "ringed": sorted(self.homes.ringed),
        }
        return {
            "spans": [asdict(span) for span in self.spans], "plan": str(self.plan), "sizes": self.sizes,
            "homes": homes, "policy": self.policy, "asked_slots": self.asked_slots, "budgets": asdict(self.budgets),
            "expected": None if self.expected is None else asdict(self.expected),
            "pageable_bytes": self.pageable_bytes, "facts": asdict(self.facts), "model_s": self.model_s,
            "overlap": self.overlap,
        }  # fmt: skip

    @classmethod
    def load(cls, path: str | PathLike[str]) -> StepRecord:
        """Read what :meth:`save` wrote; ValueError for anything else."""
        try:
            content = json.loads(json.loads(Path(path).read_text(encoding="utf-8"))["otherData"][_KEY])
            return cls._from_dict(content)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no trace that optimizer.save_trace wrote: {error!r}") from error

    @classmethod
    def _from_dict(cls, content: Mapping[str, Any]) -> StepRecord:
        homes, expected = content["homes"], content["expected"]
        residents, visitors = frozenset(homes["residents"]), frozenset(homes["visitors"])
        return cls(
            spans=tuple(Span(**span) for span in content["spans"]),
            plan=Plan.parse(content["plan"]),
            sizes=tuple((numel, param, state) for numel, param, state in content["sizes"]),
            homes=Homes(
                residents,
                visitors,
                homes["num_slots"],
                homes["num_staging"],
                frozenset(homes.get("ringed", ())),
                homes.get("num_passing_slots", 0),
            ),
            policy=content["policy"],
            asked_slots=content["asked_slots"],
            budgets=Budgets(**content["budgets"]),
            expected=None if expected is None else Rates(**expected),
            pageable_bytes=content["pageable_bytes"],
            facts=HostFacts(**content["facts"]),
            model_s=content["model_s"],
            overlap=content["overlap"],
        )


def record_step(runtime: Runtime, *, ran: Plan, busy_elsewhere: float, model_s: float) -> StepRecord:
    """The last measured step of ``runtime``, which ran the plan ``ran``.

    Raises:
        ValueError: if no step was measured.
    """
    if not runtime.spans:
        raise ValueError("no step was measured: call optimizer.time_next_step() before one, on an accelerator")
    node = None if runtime.accelerator is None else runtime.accelerator.numa_node()
    options = runtime.options
    return StepRecord(
        spans=tuple(runtime.spans),
        plan=ran,
        sizes=tuple((each.numel, each.param_bytes, each.state_bytes) for each in runtime.subgroups),
        homes=runtime.homes,
        policy=f"plan {options.policy}" if isinstance(options.policy, Plan) else str(options.policy),
        asked_slots=options.num_slots,
        budgets=options.budgets,
        expected=options.rates,
        pageable_bytes=_pageable_bytes(runtime, ran),
        facts=host_facts(node, busy_elsewhere),
        model_s=model_s,
        overlap=options.overlap,
    )


def _pageable_bytes(runtime: Runtime, ran: Plan) -> int:
    """Of host memory that the plan's copies read and write, what is not pinned."""
    visiting = [i for i, where in ran.placements.items() if where is Placement.DEVICE]
    buffers: list[Tensor | None] = [runtime.actions[i].state for i in visiting]
    for staging in runtime.pool.stagings[: ran.num_buffers(Placement.HOST)]:
        buffers += [staging.grad, staging.param]
    return sum(buffer.nbytes for buffer in buffers if buffer is not None and not buffer.is_pinned())


class StepWatch:
    """What happens around the step that was asked to be measured: time before it, and what other processes do."""

    def __init__(self, optimizer: torch.optim.Optimizer, accelerator: Accelerator | None) -> None:
        self._accelerator = accelerator
        self._meter = ProcessorMeter()
        self._ran: Plan | None = None
        self._model_s = 0.0
        self._start_s = self._now_s()
        self._handle = optimizer.register_step_pre_hook(self._begin)

    def _begin(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """The step begins: forward and backward are over once the device has done them."""
        self._handle.remove()
        if self._accelerator is not None:
            torch.accelerator.synchronize(self._accelerator.device)
        self._model_s = self._now_s() - self._start_s
        self._ran = optimizer.plan

    @property
    def has_run(self) -> bool:
        return self._ran is not None

    def record(self, runtime: Runtime) -> StepRecord:
        """The step; ValueError if it has not run yet."""
        if self._ran is None:
            raise ValueError("the step that was asked for has not run yet: call step() before save_trace()")
        busy = self._meter.busy_elsewhere()
        return record_step(runtime, ran=self._ran, busy_elsewhere=busy, model_s=self._model_s)

    def _now_s(self) -> float:
        return time.perf_counter() if self._accelerator is None else self._accelerator.host_time_s()
