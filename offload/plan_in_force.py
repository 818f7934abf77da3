"""The plan of the next step: proved before it runs for the first time, and chosen anew as measured times arrive."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from offload.beliefs import Measurement
from offload.controller import Controller, Decision
from offload.final_gradients import in_order_of
from offload.homes import Homes, first_plan, lowered, through_slots
from offload.memory import SubgroupMemory
from offload.options import Options
from offload.ordering import check_ordering, check_ordering_in_backward
from offload.perf_model import Rates
from offload.plan import Placement, Plan
from offload.pool import BudgetError, format_bytes
from offload.subgroup import Subgroup

logger = logging.getLogger("offload")


class FirstPlan(NamedTuple):
    """What subgroups begin with; the controller chooses plans from then on, None: nobody does."""

    plan: Plan
    controller: Controller | None


class PlanInForce:
    """Knows the plan, and who chooses it.

    Attributes:
        plan: of the next step.
        overlap: how its update hides.
        controller: chooses plans, with ``"auto"``.
        num_steps: that were run so far.

    Args:
        is_offloaded: whether the parameters are on an accelerator: on the CPU there is nothing to choose.
    """

    def __init__(self, options: Options, memory: SubgroupMemory, *, is_offloaded: bool) -> None:
        self.plan = Plan(())
        self.overlap = options.overlap
        self.controller: Controller | None = None
        self.num_steps = 0
        self._options = options
        self._memory = memory
        self._is_offloaded = is_offloaded
        self._chooses = options.policy == "auto"
        self._asked = options.policy if isinstance(options.policy, Plan) else None
        self._in_backward: Plan | None = None  # the last one that was checked

    def first(self, subgroups: Sequence[Subgroup], homes: Homes) -> FirstPlan:
        """What ``subgroups`` would begin with. Raises PlanError if it does not fit them."""
        controller = self._new_controller(subgroups, homes)
        fixed = first_plan(self._options.policy, len(subgroups), homes)
        plan = fixed if controller is None else controller.first_plan
        self._check(plan, subgroups, homes)
        return FirstPlan(plan, controller)

    def begin(self, first: FirstPlan) -> None:
        """Put a first plan in force."""
        self.plan, self.controller = first

    def set(self, plan: Plan) -> None:
        """Put ``plan`` in force and stop choosing. Raises as :meth:`offload.runtime.Runtime.set_plan`."""
        homes, memory, num_passing = self._memory.homes, self._memory, self._options.num_passing_slots
        num_slots = memory.num_lasting_slots + num_passing
        self._check(plan, memory.subgroups, replace(homes, num_slots=num_slots, num_passing_slots=num_passing))
        self._asked, self._chooses = plan, False
        self.plan = through_slots(plan, homes)

    def in_order_of(self, order: Sequence[int]) -> Plan:
        """The plan for a step that begins in backward, where gradients become final in ``order``."""
        plan = in_order_of(self.plan, list(order), num_slots=self._memory.num_lasting_slots)
        if plan != self._in_backward:
            check_ordering_in_backward([plan, plan], self._memory.subgroups)
            self._in_backward = plan
        return plan

    def go_on_with_other_slots(self) -> None:
        """The plan that was asked for, if there are slots for it; else the same placements, lowered to those there are.

        Without any, the CPU updates what visited.
        """
        homes, subgroups = self._memory.homes, self._memory.subgroups
        self.plan = lowered(self.plan, homes) if self._asked is None else through_slots(self._asked, homes)
        self.controller = self._new_controller(subgroups, homes) if homes.num_slots else None
        self._check(self.plan, subgroups, homes)

    @property
    def wants_measurement(self) -> bool:
        """Whether the controller wants to know what the next step takes."""
        return self.controller is not None and self.controller.wants(self.num_steps)

    @property
    def chooses(self) -> bool:
        """Whether what is measured may change the plan."""
        return self._chooses and self.controller is not None

    def observe(self, seen: Measurement, ran: Plan) -> None:
        """Let the controller choose the next plan, from a measured step."""
        assert self.controller is not None
        decision = self.controller.observe(seen, ran)
        if decision is None:
            return
        if self._options.chooses_overlap:
            self.overlap = decision.overlap or self.overlap
        if decision.plan == self.plan:
            return
        self._check(decision.plan, self._memory.subgroups, self._memory.homes)
        self.plan = decision.plan
        logger.info(
            "step %d: %s, %d of %d subgroups visit the device",
            decision.measurement.step, decision.action, decision.plan.num_visits, len(self._memory.subgroups),
        )  # fmt: skip

    @property
    def rates(self) -> Rates | None:
        """What the machine is believed to do; None before anything was measured or told."""
        return None if self.controller is None else self.controller.rates

    @property
    def decisions(self) -> Sequence[Decision]:
        """What was measured and decided so far, oldest first."""
        return [] if self.controller is None else self.controller.decisions

    def _check(self, plan: Plan, subgroups: Sequence[Subgroup], homes: Homes) -> None:
        plan.validate(
            len(subgroups), num_slots=homes.num_slots, num_staging=homes.num_staging, resident=homes.residents
        )
        visitors = {i for i, where in plan.placements.items() if where is Placement.DEVICE}
        if pageable := sorted(visitors - homes.visitors):
            needed = sum(subgroups[i].state_bytes for i in pageable)
            raise BudgetError(
                f"the plan updates subgroups {pageable} on the device, but their state is not pinned: "
                f"{format_bytes(needed)} more pinned memory is needed; construct the optimizer with plan='auto' or "
                f"with this plan, and raise pinned_budget if one is set"
            )
        for overlapped in {False, self._options.overlap != "none"}:
            num_passing = homes.num_passing_slots if overlapped else 0
            check_ordering([self.plan, plan, plan], subgroups, overlapped=overlapped, num_passing_slots=num_passing)

    def _new_controller(self, subgroups: Sequence[Subgroup], homes: Homes) -> Controller | None:
        """For "auto" on an accelerator. Parameters that join later start it anew, from the rates known by then.

        One subgroup alone is on one side or the other: no step measures both, so without rates there is no choice.
        """
        rates = self.rates or self._options.rates
        if self._options.policy != "auto" or not self._is_offloaded or not homes.visitors:
            return None
        if rates is None and len(subgroups) - len(homes.residents) == 1:
            return None
        return Controller(
            subgroups,
            homes,
            rates,
            first_step=self.num_steps,
            early_gradients=self._options.brings_gradients_early,
        )
