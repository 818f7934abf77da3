"""Planning a training job on a machine that need not be there: memory, plan, predicted step, and what would help."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from offload.candidates import Decision, decide, sampled
from offload.estimate import ZERO_STAGES, MemoryEstimate, ModelCost, estimate_memory
from offload.hardware import HardwareProfile
from offload.kernels import STATE_FORMATS
from offload.kernels.state import check_state_format
from offload.layout import resolve_subgroup_numel
from offload.perf_model import Rates
from offload.phases import StepPrediction, predict_step
from offload.planner import Search
from offload.pool import BudgetError, Budgets, format_bytes
from offload.state_layout import ADAM_FP32, StateKind, StateLayout
from offload.subgroup import Subgroup

LEVER_SAMPLE = 24  # subgroups that levers are timed with
RATE_LEVERS = {
    "twice the link": ("h2d_bytes_per_s", "d2h_bytes_per_s", "both_bytes_per_s"),
    "twice the cores": ("host_update_params_per_s",),
    "twice the host memory bandwidth": ("host_dram_bytes_per_s",),
    "twice the cores and host memory bandwidth": ("host_update_params_per_s", "host_dram_bytes_per_s"),
}


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """A model trained data-parallel on one kind of machine.

    Attributes:
        cost: what the model takes in one step of one rank.
        subgroup_numel: parameters in a subgroup; None for the runtime's default.
        state_format: of the optimizer state, one of :data:`offload.kernels.STATE_FORMATS`.

    Raises:
        ValueError: for a state format, ZeRO stage or number of ranks that is not possible.
    """

    cost: ModelCost
    profile: HardwareProfile
    num_ranks: int = 1
    zero_stage: int = 3
    subgroup_numel: int | None = None
    state_format: str = "fp32"

    def __post_init__(self) -> None:
        if self.num_ranks < 1:
            raise ValueError(f"num_ranks={self.num_ranks} is no number of ranks; give 1 or more")
        if self.zero_stage not in ZERO_STAGES:
            raise ValueError(f"zero_stage={self.zero_stage} is unknown; give one of {ZERO_STAGES}")
        check_state_format(self.state_format)

    @property
    def num_ranks_per_node(self) -> int:
        return min(self.num_ranks, self.profile.num_ranks_per_node)

    @property
    def rank_numel(self) -> int:
        """Parameters whose state this rank owns: its share under ZeRO, of every stage from 1."""
        return -(-self.cost.numel // (self.num_ranks if self.zero_stage else 1))

    def subgroups(self) -> list[Subgroup]:
        """The rank's parameters in equal subgroups."""
        return equal_subgroups(
            self.rank_numel,
            resolve_subgroup_numel(self.subgroup_numel, self.rank_numel),
            self.cost.param_itemsize,
            StateKind(self.state_format),
        )

    def rates(self, state_format: str | None = None) -> Rates:
        return Rates.from_profile(
            self.profile, state_format=state_format or self.state_format, num_ranks=self.num_ranks_per_node
        )

    def memory(self, decision: Decision | None = None) -> MemoryEstimate:
        """Memory of one rank, with the decision's buffers and states or without any."""
        return estimate_memory(
            self.cost,
            None if decision is None else decision.best.homes.bill(self.subgroups()),
            num_ranks=self.num_ranks,
            num_ranks_per_node=self.num_ranks_per_node,
            zero_stage=self.zero_stage,
        )


def equal_subgroups(
    numel: int, subgroup_numel: int, param_itemsize: int, kind: StateKind = ADAM_FP32
) -> list[Subgroup]:
    """``numel`` parameters in subgroups of ``subgroup_numel``, or a little less so that all are equal but for one."""
    num = max(1, -(-numel // subgroup_numel))
    cuts = [i * numel // num for i in range(num + 1)]
    sizes = [end - begin for begin, end in itertools.pairwise(cuts)]
    return [
        Subgroup(
            i, size, size * param_itemsize, StateLayout(kind, size).num_bytes, master_in_param=kind.master_in_param
        )
        for i, size in enumerate(sizes)
    ]


@dataclass(frozen=True, slots=True)
class Lever:
    """A change of machine or format, and the update of the best split with it."""

    name: str
    update_s: float


@dataclass(frozen=True, slots=True)
class JobPlan:
    """What :func:`plan_job` found."""

    job: TrainingJob
    budgets: Budgets
    decision: Decision
    step: StepPrediction
    memory: MemoryEstimate
    levers: tuple[Lever, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: seconds, bytes and the plan with the sizes of its subgroups."""
        job, best, step = self.job, self.decision.best, self.step
        subgroups = [[s.numel, s.param_bytes, s.state_bytes] for s in job.subgroups()]
        return {
            "model": asdict(job.cost),
            "hardware": job.profile.name,
            "ranks": job.num_ranks,
            "zero_stage": job.zero_stage,
            "state_format": job.state_format,
            "budgets": asdict(self.budgets),
            "memory": self.memory.as_dict(),
            "step": {
                "forward_s": step.forward_s, "backward_s": step.backward_s, "update_s": step.update_s,
                "step_s": step.step_s,
            },
            "plan": {
                "name": best.name, "text": str(best.plan), "update_s": best.update_s, "binds": best.bound.binds,
                "bound_s": best.bound.seconds_of, "num_slots": best.homes.num_slots,
                "num_staging": best.homes.num_staging, "subgroups": subgroups,
            },
            "alternatives": [asdict(ranked) for ranked in self.decision.ranking],
            "refused": self.decision.refused,
            "levers": [asdict(lever) for lever in self.levers],
        }  # fmt: skip


def plan_job(job: TrainingJob, budgets: Budgets | None = None, *, num_slots: int | None = None) -> JobPlan:
    """Choose a plan for ``job`` and predict its step and memory.

    Args:
        budgets: for the optimizer, as in :class:`offload.AdamW`; device_bytes None takes what the model leaves of the
            device in every phase.

    Raises:
        BudgetError: if the model alone does not fit the device, or no plan fits the budgets, with the least that would.
        ValueError: for a subgroup size that is not possible.
    """
    budgets = Budgets() if budgets is None else budgets
    if budgets.device_bytes is None:
        budgets = replace(budgets, device_bytes=_device_budget(job))
    subgroups, rates = job.subgroups(), job.rates()
    decision = decide(subgroups, rates, budgets, num_slots=num_slots)
    memory = job.memory(decision)
    step = predict_step(decision.best.plan, subgroups, rates, job.cost.layers(job.profile, memory.grad_bytes))
    return JobPlan(job, budgets, decision, step, memory, tuple(_levers(job, subgroups, decision)))


def _device_budget(job: TrainingJob) -> int:
    """Slots and resident states are there in every phase, so the phase with least headroom decides."""
    memory, capacity = job.memory(), job.profile.device_memory_bytes
    left = min(memory.headroom_bytes(capacity).values())
    if left < 0:
        raise BudgetError(
            f"{job.cost.name} does not fit {job.profile.name}: parameters, gradients and activations of one rank need "
            f"{format_bytes(memory.device_bytes)} of device memory and there are {format_bytes(capacity)}; the least "
            f"that would do is a device of {format_bytes(memory.device_bytes)}, or use more ranks with ZeRO-3, a "
            f"smaller micro-batch or sequence, or recomputation.\n{memory}"
        )
    return int(left / (1 + memory.fragmentation))


def _levers(job: TrainingJob, subgroups: Sequence[Subgroup], decision: Decision) -> Iterator[Lever]:
    """What each change would make of the best split in the same homes, fastest first."""
    rates, best = job.rates(), decision.best
    sample, homes = sampled(subgroups, best.homes, LEVER_SAMPLE)
    before_s = Search(sample, rates).best_share(homes).update_s
    found = []
    for name, fields in RATE_LEVERS.items():
        faster = replace(rates, **{field: 2 * getattr(rates, field) for field in fields})
        found.append((Search(sample, faster).best_share(homes).update_s, name))
    for state_format in STATE_FORMATS[STATE_FORMATS.index(job.state_format) + 1 :]:  # each is smaller than the last
        kind = StateKind(state_format)
        smaller = [
            replace(s, state_bytes=StateLayout(kind, s.numel).num_bytes, master_in_param=kind.master_in_param)
            for s in sample
        ]
        choice = Search(smaller, job.rates(state_format)).best_share(homes)
        found.append((choice.update_s, f"state_format {state_format}"))
    for update_s, name in sorted(found):
        yield Lever(name, best.update_s * min(1.0, update_s / before_s))
