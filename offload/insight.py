"""What an optimizer tells of itself: its plan, its memory, where its time went, what another machine would do."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from offload.explain import explain
from offload.hardware import HardwareProfile
from offload.perf_model import Prediction, Rates
from offload.plan import Plan
from offload.pool import MemoryBill
from offload.record import StepWatch
from offload.runtime import Runtime
from offload.timeline import Span
from offload.verdict import diagnose, report


class Insight(torch.optim.Optimizer):
    """The part of an optimizer that answers questions. It changes nothing but the next step's plan and measurement."""

    _step_watch: StepWatch | None

    @property
    def runtime(self) -> Runtime:
        """The runtime underneath: subgroups, plan, bill and lanes."""
        raise NotImplementedError

    @property
    def plan(self) -> Plan:
        """The plan of the next step."""
        return self.runtime.plan

    def set_plan(self, plan: Plan | str) -> None:
        """Run ``plan`` (a :class:`offload.Plan` or its text) from the next step on. Bits do not depend on it.

        Raises:
            PlanError, BudgetError: if it does not fit the subgroups, or the memory taken at construction.
        """
        self.runtime.set_plan(Plan.parse(plan) if isinstance(plan, str) else plan)

    @property
    def bill(self) -> MemoryBill:
        """Bytes taken beyond parameters and gradients."""
        return replace(self.runtime.bill, snapshot_bytes=self.runtime.copies.held_bytes)

    @classmethod
    def bill_of(cls, params: ParamsT, **arguments: Any) -> MemoryBill:
        """What an optimizer constructed with these arguments would take. Nothing is taken.

        Raises what the constructor raises, :class:`offload.BudgetError` where the system or a budget does not hold it.
        """
        unallocated = type(cls.__name__, (cls,), {"_allocates": False})
        bill: MemoryBill = unallocated(params, **arguments).bill
        return bill

    def explain(self) -> str:
        """Which subgroup is updated where, what it costs in memory, and what the rates measured so far predict.

        After a step that :meth:`time_next_step` asked for, also where its time went, what bound it and what was wrong.
        """
        text = explain(self.runtime)
        if self._step_watch is None or not self._step_watch.has_run or not self.runtime.spans:
            return text
        return f"{text}\n{report(diagnose(self._step_watch.record(self.runtime)))}"

    def save_decisions(self, path: str | PathLike[str]) -> None:
        """Write what ``plan="auto"`` measured and decided as JSON lines, for ``offload explain``.

        Raises:
            ValueError: if nothing is decided while training: another plan, a model on the CPU, one subgroup alone
                without ``profile``, or a budget that lets no state visit the device.
        """
        controller = self.runtime.in_force.controller
        if controller is None:
            raise ValueError("no decisions: only plan='auto' with states that may visit an accelerator takes any")
        controller.save(path)

    def simulate(self, machine: HardwareProfile | Rates, plan: Plan | None = None) -> Prediction:
        """Predict one update of these subgroups on a named or measured machine, without running it."""
        rates = machine if isinstance(machine, Rates) else Rates.from_profile(machine)
        return self.runtime.simulate(rates, plan)

    def time_next_step(self) -> None:
        """Measure the next step for :meth:`timeline`. That step waits for every transfer before it returns."""
        self.runtime.time_next_step = True
        self._step_watch = StepWatch(self, self.runtime.accelerator)

    def timeline(self) -> list[Span]:
        """What ran when in the last measured step, in seconds since it began; empty if none was measured."""
        return list(self.runtime.spans)

    def save_trace(self, path: str | PathLike[str]) -> None:
        """Write the last step that :meth:`time_next_step` asked for, for ``offload explain`` and for Perfetto.

        Raises:
            ValueError: if no step was measured so.
        """
        if self._step_watch is None:
            raise ValueError("no step was measured: call time_next_step() before the forward of one")
        self._step_watch.record(self.runtime).save(path)
