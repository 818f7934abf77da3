"""The executor gives the same bits in any order that its waits allow, and every one of its waits is needed."""

from __future__ import annotations

import ast
import inspect
import itertools
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import Literal, Protocol, cast, get_args

import pytest
import torch
from torch import Tensor

from offload import executor, ordering
from offload.adam import AdamSubgroup, ParamSlice, SliceUpdate
from offload.kernels import AdamScalars, adam_step
from offload.lanes import Event, Lane, Lanes, Work
from offload.lanes.inline import inline_lanes
from offload.lanes.lazy import LazyWorld, lazy_lanes
from offload.plan import CHAINS, Op, OpKind, Placement, Plan, lower
from offload.subgroup import Slot, Staging, Subgroup

# Odd and even, with and without a vector's tail; neighbours differ, so a buffer read too late is read at another size.
NUMELS = (5, 33, 16, 7, 40, 1, 24)
DTYPES = (torch.bfloat16, torch.float32)
NUM_SUBGROUPS = len(NUMELS)
NUM_BUFFERS = 3
NUM_PASSING = 1  # of the slots, where updates are overlapped
STATE_ROWS = 3


@cache
def scalars_of(step: int) -> AdamScalars:
    return AdamScalars.at_step(
        lr=0.05, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, step=step, decoupled=True, grad_scale=0.5
    )


@cache
def noise(step: int, index: int) -> Tensor:
    return torch.randn(NUMELS[index], generator=torch.Generator().manual_seed(100 * step + index))


def dtype_of(index: int) -> torch.dtype:
    return DTYPES[index % len(DTYPES)]


def initial_params() -> list[Tensor]:
    return [noise(0, i).to(dtype_of(i), copy=True) for i in range(NUM_SUBGROUPS)]


def loss_gradient(param: Tensor, step: int, index: int) -> Tensor:
    """Depends on the parameter, so a parameter read too early or too late changes all that follows."""
    return (noise(step, index) + param.float()).to(param.dtype)


class Executor(Protocol):
    """What :mod:`offload.executor` has, or its like with a wait less."""

    run_update: Callable[[Plan, Sequence[Subgroup], Sequence[Slot], Sequence[Staging], Lanes], None]
    enqueue_update: Callable[..., None]
    enqueue_in_backward: Callable[..., None]
    early_operations: Callable[[Plan], list[Op]]
    enqueue_early: Callable[..., None]
    await_params: Callable[[Subgroup, Lane], None]
    lend: Callable[[Slot, Tensor | None, Lane], None]


# When updates run: between backward and forward; beside the next forward, with early transfers; or in backward, each as
# soon as backward has made its gradients.
Schedule = Literal["in order", "overlapped", "in backward"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


class Model:
    """One parameter a subgroup. Its forward reads all parameters and its backward writes all gradients.

    Buffers start as NaN.
    Each step has actions of its own, because lazy lanes may run it when later ones are queued.
    """

    def __init__(self, lanes: Lanes, *, schedule: Schedule, executor: Executor) -> None:
        self.lanes = lanes
        self.params = initial_params()
        self.grads = [torch.full_like(param, torch.nan) for param in self.params]
        self.states = [torch.stack([p.float(), torch.zeros(p.numel()), torch.zeros(p.numel())]) for p in self.params]
        self.seen: list[Tensor] = []  # by the forwards, in order
        self._schedule = schedule
        self._executor = executor
        self._step = 0
        self._subgroups = [
            Subgroup(i, p.numel(), p.numel() * p.itemsize, STATE_ROWS * p.numel() * 4)
            for i, p in enumerate(self.params)
        ]
        largest = max(NUMELS)
        self._slots = [Slot(i, torch.full((STATE_ROWS * largest,), torch.nan)) for i in range(NUM_BUFFERS)]
        self._stagings = [Staging(i, _nan_bytes(largest), _nan_bytes(largest)) for i in range(NUM_BUFFERS)]

    def step(self, plan: Plan, idle: Collection[int] = ()) -> None:
        """Forward, backward and the update of all but the ``idle`` subgroups, enqueued."""
        self._step += 1
        self.forward()
        for subgroup, param, grad, state in zip(self._subgroups, self.params, self.grads, self.states, strict=True):
            item = ParamSlice(param, 0, param.numel())
            actions = AdamSubgroup([item], param.dtype, state, None)
            actions.begin_step([SliceUpdate(item, grad, param, scalars_of(self._step))])
            subgroup.actions = actions
        plan = plan.without(idle)
        if self._schedule == "in backward":
            self._update_in_backward(plan)
            return
        buffers = self._subgroups, self._slots, self._stagings
        begun = self._executor.early_operations(plan) if self._schedule == "overlapped" else []
        up = [op for op in begun if op.kind is OpKind.PREFETCH]
        passing = self._slots[-NUM_PASSING:] if self._schedule == "overlapped" else []
        for slot in passing:
            if slot.drained is not None:
                self.lanes.compute.wait(slot.drained)  # as the allocator hands memory on
        self._enqueue_early([op for op in up if self._slots[op.buffer] not in passing])
        self.lanes.compute.submit(Work("backward", partial(self._use_activations, passing)))
        for slot in passing:
            self._executor.lend(slot, slot.buffer, self.lanes.compute)
        self._enqueue_early([op for op in up if self._slots[op.buffer] in passing])
        for i in reversed(range(NUM_SUBGROUPS)):
            self.lanes.compute.submit(Work("backward", partial(self._backward, self._step, i)))
            self._enqueue_early([op for op in begun if op.kind is OpKind.GRAD_DOWN and op.subgroup == i])
        self.lanes.compute.submit(Work("backward", self._read_all))
        if self._schedule == "overlapped":
            backward = self.lanes.compute.mark()
            self._executor.enqueue_update(plan, *buffers, self.lanes, backward=backward, begun=begun)
        else:
            self._executor.run_update(plan, *buffers, self.lanes)

    def _update_in_backward(self, plan: Plan) -> None:
        """What comes before its gradients waits for as much of backward as makes them."""
        to_come, made = list(range(NUM_SUBGROUPS)), dict[int, Event]()
        self.lanes.compute.submit(Work("forward", self._read_all))

        def grads_ready(subgroup: Subgroup) -> Event:
            while subgroup.index not in made:
                i = to_come.pop()
                self.lanes.compute.submit(Work("backward", partial(self._backward, self._step, i)))
                made[i] = self.lanes.compute.mark()
            return made[subgroup.index]

        buffers = self._subgroups, self._slots, self._stagings
        self._executor.enqueue_in_backward(plan, *buffers, self.lanes, grads_ready=grads_ready)
        for i in reversed(to_come):
            grads_ready(self._subgroups[i])

    def forward(self) -> None:
        for subgroup, param in zip(self._subgroups, self.params, strict=True):
            if self._schedule != "in order" and subgroup.params_ready is not None:
                self._executor.await_params(subgroup, self.lanes.compute)
            self.lanes.compute.submit(Work("forward", partial(self._read, param)))

    def _read(self, param: Tensor) -> None:
        self.seen.append(param.clone())

    def _enqueue_early(self, ops: Sequence[Op]) -> None:
        for op in ops:
            self._executor.enqueue_early(
                op, self._subgroups, self._slots, self._stagings, self.lanes, grads_ready=self.lanes.compute.mark()
            )

    def _backward(self, step: int, index: int) -> None:
        param = self.params[index]
        self.grads[index].copy_(loss_gradient(param, step, index))

    @staticmethod
    def _use_activations(passing: Sequence[Slot]) -> None:
        """What backward does in the memory that passing slots will have."""
        for slot in passing:
            assert slot.buffer is not None
            slot.buffer.fill_(torch.nan)

    def _read_all(self) -> None:
        """As the recomputation of a layer that many share."""
        self.seen.extend(param.clone() for param in self.params)

    def finish(self) -> list[Tensor]:
        """All that the forwards saw, and what is left when nothing is in flight."""
        self.forward()
        self.lanes.synchronize()
        return [*self.seen, *self.params, *self.states]


def _nan_bytes(numel: int) -> Tensor:
    return torch.full((numel,), torch.nan).view(torch.uint8)


@cache
def train_in_order(idle_of_steps: tuple[frozenset[int], ...]) -> list[Tensor]:
    """What :meth:`Model.finish` has to return: the kernel and nothing else, on one subgroup after another."""
    params, seen = initial_params(), []
    states = [torch.stack([p.float(), torch.zeros(p.numel()), torch.zeros(p.numel())]) for p in params]
    for step, idle in enumerate(idle_of_steps, start=1):
        seen += 2 * [param.clone() for param in params]
        for i, (param, state) in enumerate(zip(params, states, strict=True)):
            if i not in idle:
                adam_step(*state.unbind(), loss_gradient(param, step, i), param, scalars=scalars_of(step))
    return [*seen, *(param.clone() for param in params), *params, *states]


def equal_bits(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# ---- plans at random


def random_plan(
    rng: random.Random, placements: Sequence[Placement], num_slots: int = NUM_BUFFERS, num_staging: int = NUM_BUFFERS
) -> Plan:
    """Any plan there is for ``placements``: at each point one of the operations that may come next."""
    free = {Placement.HOST: list(range(num_staging)), Placement.DEVICE: list(range(num_slots))}
    left = {i: list(CHAINS[where]) for i, where in enumerate(placements)}
    held: dict[int, int] = {}
    ops = []
    while left:
        ready = [i for i in left if i in held or placements[i] is Placement.RESIDENT or free[placements[i]]]
        i = rng.choice(ready)
        if placements[i] is Placement.RESIDENT:
            ops.append(Op(left.pop(i)[0], i))
            continue
        buffers = free[placements[i]]
        if i not in held:
            held[i] = buffers.pop(rng.randrange(len(buffers)))
        ops.append(Op(left[i].pop(0), i, held[i]))
        if not left[i]:
            buffers.append(held.pop(i))
            del left[i]
    return Plan(tuple(ops))


@dataclass(frozen=True)
class Run:
    """Plans of a few steps, which subgroups are idle in each, and whose state stays on the device throughout."""

    plans: tuple[Plan, ...]
    idle: tuple[frozenset[int], ...]


@cache
def random_run(seed: int, num_steps: int = 4) -> Run:
    """Placements, order, number of buffers and idle subgroups change every step; residents stay."""
    rng = random.Random(seed)
    residents = frozenset(rng.sample(range(NUM_SUBGROUPS), rng.choice([0, 0, 1, 2])))
    plans, idle = [], []
    for _ in range(num_steps):
        share = rng.choice([0.0, 0.3, 0.5, 0.7, 1.0])
        placements = [
            Placement.RESIDENT if i in residents else Placement.DEVICE if rng.random() < share else Placement.HOST
            for i in range(NUM_SUBGROUPS)
        ]
        num_slots, num_staging = rng.randint(1, NUM_BUFFERS), rng.randint(1, NUM_BUFFERS)
        if rng.random() < 0.3:
            order = rng.sample(range(NUM_SUBGROUPS), NUM_SUBGROUPS)
            plan = lower(placements, num_slots=num_slots, num_staging=num_staging, order=order)
        else:
            plan = random_plan(rng, placements, num_slots, num_staging)
        plan.validate(NUM_SUBGROUPS, num_slots=num_slots, num_staging=num_staging, resident=residents)
        plans.append(plan)
        idle.append(frozenset(i for i in range(NUM_SUBGROUPS) if rng.random() < rng.choice([0.0, 0.2])))
    return Run(tuple(plans), tuple(idle))


def train(run: Run, lanes: Lanes, *, schedule: Schedule = "in order", executor: Executor = executor) -> list[Tensor]:
    model = Model(lanes, schedule=schedule, executor=executor)
    for plan, idle in zip(run.plans, run.idle, strict=True):
        model.step(plan, idle)
    return model.finish()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("seed", range(20))
def test_inline_lanes_train_as_the_kernel_alone(seed: int, schedule: Schedule) -> None:
    run = random_run(seed)
    assert equal_bits(train(run, inline_lanes(), schedule=schedule), train_in_order(run.idle))


def check_any_order(seeds: range, favour: str | None, schedule: Schedule) -> None:
    for seed in seeds:
        run = random_run(seed)
        lanes = lazy_lanes(seed, eagerness=(0.0, 0.3, 0.7)[seed % 3], favour=favour)
        trained = train(run, lanes, schedule=schedule)
        assert equal_bits(trained, train_in_order(run.idle)), f"seed {seed}: {[str(plan) for plan in run.plans]}"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("favour", [None, *LazyWorld.LANES])
def test_no_order_that_the_waits_allow_changes_a_bit(favour: str | None, schedule: Schedule) -> None:
    """Six adversaries, 110 runs each: 660 random orders of random plans that change at each of four steps."""
    check_any_order(range(110 if schedule != "in backward" else 30), favour, schedule)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("favour", [None, *LazyWorld.LANES])
def test_no_order_changes_a_bit_at_length(favour: str | None, schedule: Schedule) -> None:
    check_any_order(range(1000, 3000), favour, schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_verifier_finds_no_hazard_in_random_plans(schedule: Schedule) -> None:
    for seed in range(500):
        assert find_hazards(random_run(seed), executor, schedule=schedule) == []


# ---- every wait is needed


def find_hazards(run: Run, executor: Executor, *, schedule: Schedule) -> list[str]:
    """:func:`offload.ordering.find_hazards` over an executor of ours."""
    plans = [plan.without(idle) for plan, idle in zip(run.plans, run.idle, strict=True)]
    subgroups = [Subgroup(i, numel, 2 * numel, 12 * numel) for i, numel in enumerate(NUMELS)]
    with pytest.MonkeyPatch.context() as patch:
        for name in (
            "run_update",
            "enqueue_update",
            "enqueue_in_backward",
            "early_operations",
            "enqueue_early",
            "await_params",
            "lend",
        ):
            patch.setattr(ordering, name, getattr(executor, name))
        if schedule == "in backward":
            return ordering.find_hazards_in_backward(plans, subgroups)
        overlapped = schedule == "overlapped"
        num_passing = NUM_PASSING if overlapped else 0
        return ordering.find_hazards(plans, subgroups, overlapped=overlapped, num_passing_slots=num_passing)


@dataclass(frozen=True)
class Dependency:
    """One thing that the executor's source makes a lane wait for. ``remove`` takes it out of the parsed source."""

    name: str
    kind: OpKind | None  # of the operation that waits; None for a join of whole lanes
    remove: Callable[[], object]


def dependencies(tree: ast.AST) -> Iterator[Dependency]:
    """Every element of an ``after=(...)``, every ``lane.wait(...)``, and every ``lane.mark()`` that is given a name."""
    kind_of = {
        id(node): getattr(OpKind, pattern.rsplit(".")[-1])
        for case in ast.walk(tree)
        if isinstance(case, ast.match_case) and (pattern := ast.unparse(case.pattern)).startswith("OpKind.")
        for node in ast.walk(case)
    }
    for node in ast.walk(tree):
        match node:
            case ast.keyword(arg="after", value=value):
                assert isinstance(value, ast.Tuple), f"write `after` as a tuple, not as {ast.unparse(value)}"
                for i, element in enumerate(value.elts):
                    kind = kind_of.get(id(node))
                    name = f"{kind.name if kind else 'other'} after {ast.unparse(element)}"
                    yield Dependency(name, kind, partial(value.elts.pop, i))
            case ast.Expr(value=ast.Call(func=ast.Attribute(attr="wait"))):
                yield Dependency(ast.unparse(node), None, partial(setattr, node, "value", ast.Constant(None)))
            case ast.Assign(value=ast.Call(func=ast.Attribute(attr="mark"))):
                yield Dependency(ast.unparse(node), None, partial(setattr, node, "value", ast.Constant(None)))


SOURCE = inspect.getsource(executor)
DEPENDENCIES = list(dependencies(ast.parse(SOURCE)))
NAMES = [dependency.name for dependency in DEPENDENCIES]


def executor_without(name: str) -> Executor:
    """The executor, less one dependency."""
    tree = ast.parse(SOURCE)
    next(dependency for dependency in dependencies(tree) if dependency.name == name).remove()
    mutant = ModuleType(f"executor without {name}")
    exec(compile(ast.fix_missing_locations(tree), mutant.__name__, "exec"), vars(mutant))
    return cast(Executor, mutant)


# Steps in which every dependency orders something that nothing else orders: staging buffers and slots are used again
# within a step, the state flushed last is prefetched first, and into a slot that was drained before; once the
# parameters that go up first are those whose gradient comes down first, long before backward is done; once the last
# slot is used, which has its memory from backward where updates are overlapped.
WITNESS = Run(
    plans=tuple(
        Plan.parse(text)
        for text in (
            "D0@0 C0@0 U0@0 D1@0 C1@0 U1@0 D5@1 D6@2 C6@2 C5@1 U5@1 U6@2 P2@1 G2@1 F2@1 P3@1 G3@1 F3@1 P4@0 G4@0 F4@0",
            "P4@1 G4@1 F4@1 D0@0 C0@0 U0@0 D1@0 C1@0 U1@0 P2@0 G2@0 F2@0 P3@1 G3@1 F3@1 D5@1 D6@2 C6@2 C5@1 U5@1 U6@2",
            "D6@2 C6@2 U6@2 D5@1 C5@1 U5@1 D0@0 C0@0 U0@0 D1@0 C1@0 U1@0 P2@0 G2@0 F2@0 P3@1 G3@1 F3@1 P4@2 G4@2 F4@2",
            "P2@0 G2@0 F2@0 P3@0 G3@0 F3@0 P4@1 G4@1 F4@1 D0@0 C0@0 U0@0 D1@0 C1@0 U1@0 D5@1 D6@2 C6@2 C5@1 U5@1 U6@2",
        )
    ),
    idle=(frozenset(),) * 4,
)
WITNESS_RESULT = train_in_order(WITNESS.idle)


UPDATE_WAIT, UPLOAD_WAIT = "lanes.update.wait(grads_ready(subgroup))", "lanes.h2d.wait(backward)"
LENDING = "slot.drained = compute.mark()"


def is_needed(name: str, *, schedule: Schedule) -> bool:
    """In order, the update lane is the compute lane, which knows when its own backward ends.

    Uploads wait for backward where gradients came down before it was done.
    """
    needed_in: dict[str, tuple[Schedule, ...]] = {
        UPDATE_WAIT: ("overlapped", "in backward"),
        UPLOAD_WAIT: ("overlapped",),
        LENDING: ("overlapped",),
    }
    return schedule in needed_in.get(name, SCHEDULES)


NEEDED = [(name, schedule) for schedule in SCHEDULES for name in NAMES if is_needed(name, schedule=schedule)]


def is_caught_by_numbers(mutant: Executor, lanes: Lanes, *, schedule: Schedule) -> bool:
    return not equal_bits(train(WITNESS, lanes, schedule=schedule, executor=mutant), WITNESS_RESULT)


def test_dependencies_are_read_from_the_source() -> None:
    assert len(set(NAMES)) == len(NAMES)
    count = Counter(dependency.kind for dependency in DEPENDENCIES)
    for kind in (*CHAINS[Placement.HOST], *CHAINS[Placement.DEVICE]):
        assert count[kind] > 0, f"no dependency of {kind.name} was found"
    assert count[None] > 0
    assert SOURCE.count("after=") == SOURCE.count(".submit(") - 1  # all but the resident update's are looked into
    assert {UPDATE_WAIT, UPLOAD_WAIT, LENDING} < set(NAMES)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("favour", [None, *LazyWorld.LANES])
def test_witness_is_sound(favour: str | None, seed: int, schedule: Schedule) -> None:
    assert not is_caught_by_numbers(executor, lazy_lanes(seed, favour=favour), schedule=schedule)
    assert find_hazards(WITNESS, executor, schedule=schedule) == []


@pytest.mark.parametrize(("name", "schedule"), NEEDED)
def test_verifier_catches_each_missing_wait(name: str, schedule: Schedule) -> None:
    assert find_hazards(WITNESS, executor_without(name), schedule=schedule), f"nothing needs `{name}`: remove it"


@pytest.mark.parametrize(("name", "schedule"), NEEDED)
def test_numbers_catch_each_missing_wait(name: str, schedule: Schedule) -> None:
    """One adversary, the one that runs the lane that no longer waits as early as it can, catches it at every seed."""
    mutant, seeds = executor_without(name), range(20 if schedule != "in backward" else 5)
    assert any(
        all(is_caught_by_numbers(mutant, lazy_lanes(seed, favour=favour), schedule=schedule) for seed in seeds)
        for favour in LazyWorld.LANES
    ), f"no adversary always catches a missing `{name}`"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", NAMES)
def test_verifier_names_a_hazard_wherever_numbers_are_wrong(name: str, schedule: Schedule) -> None:
    """The two proofs know nothing of each other; the verifier may warn of what happens to end well, not the reverse."""
    mutant = executor_without(name)
    for seed, favour in itertools.product(range(6), LazyWorld.LANES):
        run = random_run(seed)
        trained = train(run, lazy_lanes(seed, favour=favour), schedule=schedule, executor=mutant)
        if not equal_bits(trained, train_in_order(run.idle)):
            assert find_hazards(run, mutant, schedule=schedule)
