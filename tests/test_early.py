"""What begins in backward: which operations, when they count, and what makes them void."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import offload
from offload import Static, Stride
from offload.executor import early_operations
from offload.plan import Plan
from tests.training import assert_same_bits, loss_of, mlp, snapshot, state_snapshot

pytestmark = pytest.mark.usefixtures("one_torch_thread")

PLAN = "D3@0 D2@1 P1@0 C3@0 U3@0 C2@1 U2@1 G1@0 F1@0 D0@0 C0@0 U0@0"


def test_early_operations_are_the_first_in_their_buffers() -> None:
    early = early_operations(Plan.parse("P0@0 D1@0 G0@0 C1@0 U1@0 F0@0 P2@0 D3@1 D4@0 C3@1 C4@0 R5"))
    assert [str(op) for op in early] == ["P0@0", "D1@0", "D3@1"]
    assert early_operations(Plan(())) == []


Between = Callable[["Training"], object]


IN_ORDER: dict[str, Any] = {"overlap": "none"}
UNDER_FORWARD: dict[str, Any] = {"overlap": "next_forward", "early_gradients": True}
EARLY: dict[str, dict[str, Any]] = {"backward": {"overlap": "backward"}, "early gradients": UNDER_FORWARD}


class Training:
    """Four layers in four subgroups on the device; ``passes`` has the early copies of each backward pass."""

    def __init__(self, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
        self.model = mlp(device="sim", dtype=dtype)
        arguments = {"lr": 1e-2, "plan": PLAN, "subgroup_numel": 600, **options}
        self.optimizer = offload.AdamW(self.model.parameters(), **arguments)
        self.passes: list[list[str]] = []
        early = self.optimizer.runtime._early
        enqueue = early._enqueue

        def note(op: offload.Op, *args: object) -> None:
            self.passes[-1].append(str(op))
            enqueue(op, *args)  # type: ignore[arg-type]

        early._enqueue = note  # type: ignore[method-assign]

    def step(self, step: int, num_passes: int, between: Between) -> None:
        self.optimizer.zero_grad()
        for i in range(num_passes):
            self.passes.append([])
            loss_of(self.model, 10 * step + i).backward()
        between(self)
        self.optimizer.step()

    def result(self) -> object:
        return snapshot(self.model), state_snapshot(self.optimizer)


def trained(
    options: dict[str, Any],
    between: Between = lambda training: None,
    num_passes: tuple[int, ...] = (1,) * 5,
    dtype: torch.dtype = torch.float32,
) -> Training:
    training = Training(options, dtype)
    for step, num in enumerate(num_passes):
        training.step(step, num, between)
    return training


@pytest.mark.parametrize("options", EARLY.values(), ids=EARLY)
def test_gradients_go_down_in_the_last_pass(options: dict[str, Any], sim: ModuleType) -> None:
    sim.configure("lazy")
    training = trained(options, num_passes=(2, 2, 2))
    assert training.passes[:2] == [["P1@0"], []]
    assert training.passes[2:] == [["P1@0"], ["D3@0", "D2@1"]] * 2
    assert sim.races() == []
    assert_same_bits(training.result(), trained(IN_ORDER, num_passes=(2, 2, 2)).result())


def test_only_states_come_early_unless_gradients_are_asked_for(sim: ModuleType) -> None:
    assert trained({"overlap": "next_forward"}).passes[1:] == [["P1@0"]] * 4
    assert trained(IN_ORDER).passes == [[]] * 5


@pytest.mark.parametrize("options", EARLY.values(), ids=EARLY)
@pytest.mark.parametrize("num_passes", [(1, 1, 2, 2, 1), (2, 2, 1, 1, 3)])
def test_the_number_of_passes_may_change(num_passes: tuple[int, ...], options: dict[str, Any], sim: ModuleType) -> None:
    expected = trained(IN_ORDER, num_passes=num_passes).result()
    for executor in ("lazy", "eager", "random"):
        sim.configure(executor)
        assert_same_bits(trained(options, num_passes=num_passes).result(), expected)
        assert sim.races() == []


def scale_in_place(training: Training) -> None:
    for param in training.model.parameters():
        assert param.grad is not None
        param.grad.mul_(0.5)


def replace_gradient(training: Training) -> None:
    for param in training.model.parameters():
        assert param.grad is not None
        param.grad = param.grad * 0.5


def drop_gradient(training: Training) -> None:
    training.model[6].weight.grad = None


def edit_parameters(training: Training) -> None:
    with torch.no_grad():
        training.model[2].weight.mul_(0.5)
        training.model[6].weight.mul_(0.5)


def edit_state(training: Training) -> None:
    training.optimizer.synchronize()
    for entry in training.optimizer.state.values():
        entry["exp_avg"].mul_(0.5)


VOID: dict[str, Between] = {
    "gradient scaled in place": scale_in_place,
    "gradient replaced": replace_gradient,
    "gradient dropped": drop_gradient,
    "torch's clipping": lambda training: nn.utils.clip_grad_norm_(training.model.parameters(), 0.1),
    "our clipping": lambda training: training.optimizer.clip_grad_norm_(0.1),
    "parameters edited": edit_parameters,
    "state edited": edit_state,
    "state loaded": lambda training: training.optimizer.load_state_dict(training.optimizer.state_dict()),
    "another pass": lambda training: loss_of(training.model, 99).backward(),
    "step skipped": lambda training: training.optimizer.zero_grad() or loss_of(training.model, 98).backward(),  # type: ignore[func-returns-value]
}


WAYS = {**EARLY, "states only": {"overlap": "next_forward"}}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("between", VOID.values(), ids=VOID)
def test_what_changes_after_backward_counts(between: Between, options: dict[str, Any], sim: ModuleType) -> None:
    def after_the_first(training: Training) -> None:
        if training.optimizer.state:
            training.passes.append([])
            between(training)

    expected = trained(IN_ORDER, after_the_first).result()
    for executor in ("lazy", "eager"):
        sim.configure(executor)
        assert_same_bits(trained(options, after_the_first).result(), expected)
        assert sim.races() == []


@pytest.mark.parametrize("options", EARLY.values(), ids=EARLY)
def test_parameters_that_came_down_early_may_change(options: dict[str, Any], sim: ModuleType) -> None:
    """In split16 the parameter is half the master, and goes down with the gradient."""

    def edit(training: Training) -> None:
        if training.optimizer.state:
            edit_parameters(training)

    split16 = {"state_format": "split16"}
    expected = trained({**IN_ORDER, **split16}, edit, dtype=torch.bfloat16).result()
    for executor in ("lazy", "eager"):
        sim.configure(executor)
        assert_same_bits(trained({**options, **split16}, edit, dtype=torch.bfloat16).result(), expected)
        assert sim.races() == []


def fail(_: torch.Tensor) -> None:
    raise RuntimeError("in the middle of backward")


ZERO: dict[str, Between] = {
    "by the optimizer": lambda training: training.optimizer.zero_grad(),
    "in place": lambda training: training.optimizer.zero_grad(set_to_none=False),
    "by the model": lambda training: training.model.zero_grad(),
}


@pytest.mark.parametrize("options", EARLY.values(), ids=EARLY)
@pytest.mark.parametrize("zero", ZERO.values(), ids=ZERO)
def test_backward_fails_after_gradients_went_down(zero: Between, options: dict[str, Any], sim: ModuleType) -> None:
    """Autograd tells nobody: what is next in their memory waits for the copies, and so do later passes."""

    def result_of(options: dict[str, Any]) -> tuple[object, list[list[str]]]:
        training = Training(options)
        for step in range(5):
            for fails in (True, False) if step == 2 else (False,):
                zero(training)
                training.passes.append([])
                hook = training.model[2].weight.register_hook(fail) if fails else None
                with pytest.raises(RuntimeError, match="in the middle of backward") if fails else nullcontext():
                    loss_of(training.model, step).backward()
                if hook is not None:
                    hook.remove()
            scale_in_place(training)
            training.optimizer.step()
        return training.result(), training.passes

    expected, _ = result_of(IN_ORDER)
    for executor in ("lazy", "eager"):
        sim.configure(executor)
        result, passes = result_of(options)
        assert_same_bits(result, expected)
        assert passes[1:] == [["P1@0", "D3@0", "D2@1"]] * 2 + [[], ["P1@0"], ["P1@0", "D3@0", "D2@1"]]
        assert sim.races() == []


# ---- early gradients under the next forward


@pytest.mark.parametrize("plan", ["auto", "host", Static(0.5), Stride(2)], ids=str)
def test_each_gradient_that_goes_down_has_a_staging_buffer(plan: Any, sim: ModuleType) -> None:
    """And goes down in backward; the bill has the buffers."""
    training = Training({**UNDER_FORWARD, "plan": plan})
    without = Training({"overlap": "next_forward", "plan": plan})
    optimizer, runtime = training.optimizer, training.optimizer.runtime
    num_host = 4 if plan == "auto" else sum(op.kind.value == "D" for op in optimizer.plan.ops)
    assert runtime.homes.num_staging == len(runtime.pool.stagings) == num_host
    of_one = without.optimizer.bill.staging_bytes // without.optimizer.runtime.homes.num_staging
    assert optimizer.bill.staging_bytes == num_host * of_one
    for step in range(3):
        training.step(step, 1, lambda training: None)
        without.step(step, 1, lambda training: None)
    if plan != "auto":  # whose steps are measured at first
        down = {str(op) for op in optimizer.plan.ops if op.kind.value == "D"}
        assert all(down <= {*ops} for ops in training.passes[1:])
    assert_same_bits(training.result(), without.result())
    assert sim.races() == []


def test_budgets_decide_how_many_gradients_come_early(sim: ModuleType) -> None:
    """Those that are needed first."""
    bill = Training({"overlap": "next_forward", "plan": "host"}).optimizer.bill
    room = bill.host_bytes + bill.staging_bytes // 2  # two staging buffers, and one more
    training = trained({**UNDER_FORWARD, "plan": "host", "host_budget": room})
    assert training.optimizer.runtime.homes.num_staging == 3
    assert training.optimizer.bill.host_bytes == room
    assert training.passes[1:] == [["D2@2", "D1@1", "D0@0"]] * 4
    assert Training({**UNDER_FORWARD, "plan": "host", "host_budget": room - 1}).optimizer.bill == bill


def test_parameters_that_join_have_staging_buffers_too(sim: ModuleType) -> None:
    training = Training({**UNDER_FORWARD, "plan": "host"})
    training.step(0, 1, lambda training: None)
    training.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(64, device="sim"))]})
    assert training.optimizer.runtime.homes.num_staging == 5
    training.step(1, 1, lambda training: None)
    assert sim.races() == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"overlap": "none"}, ValueError, "early_gradients=True has no use with overlap='none'.* give another overlap"),
        ({"plan": "device"}, ValueError, "early_gradients=True has no use with plan='device'.* leave one of them out"),
        ({"early_gradients": 1}, TypeError, "early_gradients must be True or False, not 1"),
    ],
)
def test_what_early_gradients_do_not_go_with(
    options: dict[str, Any], error: type[Exception], message: str, sim: ModuleType
) -> None:
    with pytest.raises(error, match=message):
        Training({"early_gradients": True, **options})


def test_several_ranks_have_no_early_gradients(sim: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.arguments.num_distributed_ranks", lambda: 2)
    with pytest.raises(ValueError, match=r"early_gradients=True in a program of 2 ranks: .* without early_gradients"):
        Training(UNDER_FORWARD)


def test_nothing_comes_early_on_the_cpu() -> None:
    """Where overlap="auto" hides nothing: no staging buffers are taken either."""
    model = mlp()
    early, plain = (offload.AdamW(model.parameters(), early_gradients=asked) for asked in (True, False))
    assert early.runtime.overlap == "none"
    assert early.bill == plain.bill


def test_hooks_go_with_the_optimizer(sim: ModuleType) -> None:
    model = mlp(device="sim")
    optimizer = offload.AdamW(model.parameters(), overlap="next_forward")
    assert model[0].weight._post_accumulate_grad_hooks
    del optimizer
    assert not model[0].weight._post_accumulate_grad_hooks
