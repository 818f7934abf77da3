"""Planning a training job on a machine that need not be there: memory, plan, predicted step, and what would help."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from offload.candidates import Decision, decide, sampled
from offload.estimate import ZERO_STAGES, MemoryEstimate, ModelCost, estimate_memory
from offload.hardware import HardwareProfile
from offload.homes import Homes, stage_gradients
from offload.kernels import STATE_FORMATS
from offload.kernels.state import check_state_format
from offload.layer_costs import Layer
from offload.layout import resolve_subgroup_numel
from offload.overlaps import describe, hide, ways_to_hide
from offload.perf_model import Rates
from offload.phases import Hiding, StepPrediction
from offload.plan import Placement, Plan
from offload.planner import Choice, Search
from offload.pool import BudgetError, Budgets, format_bytes
from offload.state_layout import ADAM_FP32, StateKind, StateLayout
from offload.subgroup import Subgroup

LEVER_SAMPLE = 24  # subgroups that levers, and ways to hide the update of large models, are timed with
MAX_HIDDEN = 72  # subgroups of models whose whole step is timed for each way to hide the update,
NUM_HIDDEN = 2  # and for so many of the fastest plans
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
        grad_itemsize: bytes of one gradient; None for those of a parameter.
        clips: gradients are clipped by their global norm, so that no update may begin in backward.

    Raises:
        ValueError: for a state format, ZeRO stage or number of ranks that is not possible.
    """

    cost: ModelCost
    profile: HardwareProfile
    num_ranks: int = 1
    zero_stage: int = 3
    subgroup_numel: int | None = None
    state_format: str = "fp32"
    grad_itemsize: int | None = None
    clips: bool = True

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
            grad_itemsize=self.grad_itemsize,
        )

    def rates(self, state_format: str | None = None) -> Rates:
        return Rates.from_profile(
            self.profile, state_format=state_format or self.state_format, num_ranks=self.num_ranks_per_node
        )

    def memory(self, choice: Choice | None = None) -> MemoryEstimate:
        """Memory of one rank, with the buffers and states of a plan or without any."""
        return estimate_memory(
            self.cost,
            None if choice is None else choice.homes.bill(self.subgroups()),
            grad_itemsize=self.grad_itemsize,
            num_ranks=self.num_ranks,
            num_ranks_per_node=self.num_ranks_per_node,
            zero_stage=self.zero_stage,
        )


def equal_subgroups(
    numel: int,
    subgroup_numel: int,
    param_itemsize: int,
    kind: StateKind = ADAM_FP32,
    *,
    grad_itemsize: int | None = None,
) -> list[Subgroup]:
    """``numel`` parameters in subgroups of ``subgroup_numel``, or a little less so that all are equal but for one."""
    num = max(1, -(-numel // subgroup_numel))
    cuts = [i * numel // num for i in range(num + 1)]
    return [
        Subgroup(
            i,
            size,
            size * param_itemsize,
            StateLayout(kind, size).num_bytes,
            master_in_param=kind.master_in_param,
            grad_bytes=None if grad_itemsize is None else size * grad_itemsize,
        )
        for i, size in enumerate(end - begin for begin, end in itertools.pairwise(cuts))
    ]


@dataclass(frozen=True, slots=True)
class HiddenUpdate:
    """A plan's step with its update hidden one way: seconds of the step, and of what the update adds to the model's."""

    plan_name: str
    hiding: Hiding
    step_s: float
    update_s: float
    is_exact: bool = True  # else of a sample of the subgroups, scaled up

    def as_dict(self) -> dict[str, Any]:
        seconds = {"step_s": self.step_s, "update_s": self.update_s, "is_exact": self.is_exact}
        return {"name": describe(self.hiding), "plan": self.plan_name, **asdict(self.hiding), **seconds}


@dataclass(frozen=True, slots=True)
class Lever:
    """A change of machine or format, and the update of the best split with it."""

    name: str
    update_s: float


@dataclass(frozen=True, slots=True)
class JobPlan:
    """What :func:`plan_job` found.

    Attributes:
        decision: candidates by the time of their update alone.
        choice: the plan with the shortest step, in the order in which it runs.
        hidden: ways to hide the update of that plan and of others that are as fast, the shortest step first.
        step: the whole step as ``hidden[0]`` has it.
        device_room: bytes that the model leaves the optimizer on the device in every phase.
    """

    job: TrainingJob
    budgets: Budgets
    decision: Decision
    choice: Choice
    hidden: tuple[HiddenUpdate, ...]
    step: StepPrediction
    memory: MemoryEstimate
    device_room: int
    levers: tuple[Lever, ...]

    @property
    def warning(self) -> str | None:
        """What is wrong with a budget that the device does not hold beside the model."""
        taken, capacity = self.memory.bill.device_bytes, self.job.profile.device_memory_bytes
        if taken <= self.device_room:
            return None
        return (
            f"the plan does not fit {self.job.profile.name}: with {format_bytes(taken)} of slots and resident state "
            f"a step peaks at {format_bytes(self.memory.device_bytes)} of {format_bytes(capacity)}; the most that fits "
            f"is device_budget {format_bytes(self.device_room)} ({self.device_room} bytes)"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON: seconds, bytes and the plan with the sizes of its subgroups."""
        job, best, step = self.job, self.choice, self.step
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
                "step_s": step.step_s, **asdict(self.hidden[0].hiding),
            },
            "plan": {
                "name": best.name, "text": str(best.plan), "update_s": best.update_s, "binds": best.bound.binds,
                "bound_s": best.bound.seconds_of, "num_slots": best.plan.num_buffers(Placement.DEVICE),
                "num_staging": best.homes.num_staging, "subgroups": subgroups,
            },
            "overlaps": [hidden.as_dict() for hidden in self.hidden],
            "warning": self.warning,
            "alternatives": [asdict(ranked) for ranked in self.decision.ranking],
            "refused": self.decision.refused,
            "levers": [asdict(lever) for lever in self.levers],
        }  # fmt: skip


def plan_job(job: TrainingJob, budgets: Budgets | None = None, *, num_slots: int | None = None) -> JobPlan:
    """Choose a plan for ``job`` and how its update hides, and predict its step and memory.

    Args:
        budgets: for the optimizer, as in :class:`offload.AdamW`; device_bytes None takes what the model leaves of the
            device in every phase.

    Raises:
        BudgetError: if the model alone does not fit the device, the budget does not beside it, or no plan fits the
            budgets, with the least that would.
        ValueError: for a subgroup size that is not possible.
    """
    budgets = Budgets() if budgets is None else budgets
    room = _device_room(job)
    if budgets.device_bytes is None:
        budgets = replace(budgets, device_bytes=room)
    subgroups, rates = job.subgroups(), job.rates()
    decision = decide(subgroups, rates, budgets, num_slots=num_slots)
    hidden, chosen, step = _hide(job, decision, subgroups, budgets)
    if step.plan != chosen.plan:  # in another order, with more buffers or other visits
        homes = _staged(chosen.homes, subgroups, budgets) if hidden[0].hiding.early_gradients else chosen.homes
        chosen = Search(subgroups, rates).choice(hidden[0].plan_name, homes, step.plan)
    levers = tuple(_levers(job, subgroups, chosen))
    return JobPlan(job, budgets, decision, chosen, tuple(hidden), step, job.memory(chosen), room, levers)


def _hide(
    job: TrainingJob, decision: Decision, subgroups: Sequence[Subgroup], budgets: Budgets
) -> tuple[tuple[HiddenUpdate, ...], Choice, StepPrediction]:
    """Ways to hide the update of the fastest plans, the shortest step first; whose update that is, and its step.

    Of large models only the fastest plan is hidden, by a sample of its subgroups, and no slots pass: next to so many
    subgroups a few slots more hide little.
    """
    rates, layers = job.rates(), job.cost.layers(job.profile, job.memory().grad_bytes)
    if len(subgroups) <= MAX_HIDDEN:
        found = [
            (choice, hiding, step)
            for choice in (decision.best, *decision.runners_up)[:NUM_HIDDEN]
            for hiding, step in hide(
                choice.plan,
                subgroups,
                rates,
                layers,
                ways_to_hide(choice.plan, subgroups, layers, clips=job.clips),
                choice.homes.visitors,
                most_staging=_staged(choice.homes, subgroups, budgets).num_staging,
            )
        ]
        best_of: dict[Hiding, tuple[Choice, StepPrediction]] = {}
        for choice, hiding, step in sorted(found, key=lambda item: item[2].step_s):
            best_of.setdefault(hiding, (choice, step))
        hidden = [
            HiddenUpdate(_name(c, step.plan), hiding, step.step_s, step.update_s)
            for hiding, (c, step) in best_of.items()
        ]
        return tuple(hidden), *next(iter(best_of.values()))
    best = decision.best
    sample, homes = sampled(subgroups, best.homes, LEVER_SAMPLE)
    share = sum(s.numel for s in sample) / sum(s.numel for s in subgroups)
    plan = Search(sample, rates).spread(homes, round(best.num_device * share))
    shorter = [Layer(layer.forward_s * share, layer.backward_s * share) for layer in layers]
    most = _staged(best.homes, subgroups, budgets).num_staging
    ways = ways_to_hide(plan, sample, shorter, clips=job.clips)
    ranked = hide(plan, sample, rates, shorter, ways, most_staging=round(most * share))
    (_, step), *_ = hide(best.plan, subgroups, rates, layers, [ranked[0][0]], most_staging=most)
    about = [
        HiddenUpdate(best.name, hiding, step.step_s / share, step.update_s / share, is_exact=False)
        for hiding, step in ranked[1:]
    ]
    return (HiddenUpdate(best.name, ranked[0][0], step.step_s, step.update_s), *about), best, step


def _staged(homes: Homes, subgroups: Sequence[Subgroup], budgets: Budgets) -> Homes:
    """``homes`` with the staging buffers that early gradients get."""
    return stage_gradients(homes, "auto", subgroups, budgets)


def _name(choice: Choice, plan: Plan) -> str:
    """Of a plan that was made of a choice's to hide its update."""
    same = plan.num_visits == choice.plan.num_visits
    return choice.name if same else f"{plan.num_visits} of {len(plan.placements)} visit"


def _device_room(job: TrainingJob) -> int:
    """Device bytes that the model leaves the optimizer.

    Slots and resident states are there in every phase, so the phase with least headroom decides.
    """
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


def _levers(job: TrainingJob, subgroups: Sequence[Subgroup], best: Choice) -> Iterator[Lever]:
    """What each change would make of the best split in the same homes, fastest first."""
    rates = job.rates()
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
    if any(s.down_bytes > s.param_bytes and not s.master_in_param for s in sample):
        narrow = [replace(s, grad_bytes=None) for s in sample]
        found.append((Search(narrow, rates).best_share(homes).update_s, "gradients as wide as parameters"))
    for update_s, name in sorted(found):
        yield Lever(name, best.update_s * min(1.0, update_s / before_s))
