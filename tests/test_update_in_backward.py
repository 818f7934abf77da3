"""Updates that begin in backward: the bits of those after it, and an error for whatever would make them others."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import offload
from offload import Static, Stride
from offload.final_gradients import FinalGradients, in_order_of
from offload.ordering import find_hazards_in_backward
from offload.plan import Placement, Plan
from offload.subgroup import Subgroup
from tests.training import assert_same_bits, loss_of, mlp, snapshot, state_snapshot

pytestmark = pytest.mark.usefixtures("one_torch_thread")

HYPER: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "subgroup_numel": 600}
PLANS = ("host", "device", Stride(2), Static(0.5))
FIXED = "D3@0 D2@1 P1@0 C3@0 U3@0 C2@1 U2@1 G1@0 F1@0 D0@0 C0@0 U0@0"
NUM_STEPS = 4
WIDTH = 24  # a layer of this width is a subgroup


def optimizer_for(model: nn.Module, **arguments: Any) -> offload.AdamW:
    return offload.AdamW(model.parameters(), **{**HYPER, "plan": Stride(2), "overlap": "next_forward", **arguments})


def num_begun(optimizer: offload.AdamW) -> int:
    """Subgroups that are in flight while the context is open."""
    flight = optimizer.runtime._conductor._flight
    assert flight is not None
    return sum(future.done() for future in flight.gradients.values())


def result(model: nn.Module, optimizer: offload.AdamW) -> object:
    return snapshot(model), state_snapshot(optimizer)


class Recomputed(nn.Module):
    """One layer shared by two segments, each recomputed by a backward pass of its own: its gradient arrives twice."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first, self.shared, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.first, self.shared, self.shared, self.last):
            x = checkpoint(lambda y, part=part: part(y).tanh(), x, use_reentrant=self.reentrant)
        return x


def mlp_loss(model: nn.Module, seed: int) -> Tensor:
    assert isinstance(model, nn.Sequential)
    return loss_of(model, seed)


def recomputed_loss(model: nn.Module, seed: int) -> Tensor:
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(seed)).to("sim").requires_grad_()
    return model(x).square().mean()


def skipping_loss(model: nn.Module, seed: int) -> Tensor:
    """Leaves a layer out in some steps."""
    assert isinstance(model, nn.Sequential)
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(seed)).to("sim")
    for i, layer in enumerate(model):
        if i != 2 * (seed % 4):
            x = layer(x)
    return x.square().mean()


def square_mlp() -> nn.Module:
    return mlp((WIDTH,) * 5, device="sim")


def recomputed(*, reentrant: bool) -> nn.Module:
    torch.manual_seed(0)
    return Recomputed(reentrant=reentrant).to("sim")


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, int], Tensor]]] = {
    "layers": (lambda: mlp(device="sim"), mlp_loss),
    "bfloat16": (lambda: mlp(device="sim", dtype=torch.bfloat16), mlp_loss),
    "layers left out": (square_mlp, skipping_loss),
    "recomputed": (lambda: recomputed(reentrant=False), recomputed_loss),
    "recomputed, reentrant": (lambda: recomputed(reentrant=True), recomputed_loss),
}


def train(name: str, *, in_backward: bool, num_micro_batches: int = 1, **arguments: Any) -> tuple[object, list[int]]:
    """What is left after some steps, and how many subgroups were begun before backward was over in each."""
    make, loss_of_model = MODELS[name]
    model = make()
    optimizer = optimizer_for(model, **arguments)
    begun = []
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        for i in range(num_micro_batches):
            loss = loss_of_model(model, 10 * step + i) / num_micro_batches
            if in_backward and i == num_micro_batches - 1:
                with optimizer.update_in_backward():
                    loss.backward()
                    begun.append(num_begun(optimizer))
            else:
                loss.backward()
        optimizer.step()
    return result(model, optimizer), begun


@pytest.mark.parametrize("name", MODELS)
def test_same_bits_as_after_backward(name: str, sim: ModuleType) -> None:
    expected, _ = train(name, in_backward=False, overlap="none")
    for executor, overlap in (("lazy", "next_forward"), ("eager", "backward"), ("random", "next_forward")):
        sim.configure(executor, seed=5)
        trained, begun = train(name, in_backward=True, overlap=overlap)
        assert_same_bits(trained, expected)
        assert begun[0] == 0
        assert max(begun) > 0
        assert sim.races() == []


def test_same_bits_wherever_the_update_runs(sim: ModuleType) -> None:
    expected, _ = train("layers", in_backward=False, num_micro_batches=2, overlap="none")
    for plan, executor in zip((*PLANS, FIXED), ("lazy", "eager", "random", "lazy", "eager"), strict=True):
        sim.configure(executor)
        trained, begun = train("layers", in_backward=True, num_micro_batches=2, plan=plan)
        assert_same_bits(trained, expected)
        assert begun == [0, 4, 4, 4]
        assert sim.races() == []


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_same_bits_in_every_way(name: str, sim: ModuleType) -> None:
    for num_micro_batches in (1, 4):
        sim.configure("sync")
        expected, _ = train(name, in_backward=False, num_micro_batches=num_micro_batches, overlap="none")
        for executor, overlap, plan in itertools.product(
            ("sync", "threads", "lazy", "eager", "random"), ("backward", "next_forward"), PLANS
        ):
            sim.configure(executor, seed=7)
            trained, _ = train(name, in_backward=True, num_micro_batches=num_micro_batches, overlap=overlap, plan=plan)
            assert_same_bits(trained, expected)
            assert sim.races() == []


def test_steps_of_both_kinds_alternate(sim: ModuleType) -> None:
    results = []
    for every in (2, 100):
        sim.configure("lazy")
        model = mlp(device="sim")
        optimizer = optimizer_for(model, overlap="backward")
        for step in range(5):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            if step % every == every - 1:
                with optimizer.update_in_backward():
                    loss.backward()
            else:
                loss.backward()
                optimizer.clip_grad_norm_(1e9)
            optimizer.step()
        results.append(result(model, optimizer))
        assert sim.races() == []
    assert_same_bits(results[0], results[1])


@pytest.mark.parametrize("arguments", [{"overlap": "none"}, {"plan": "auto"}], ids=str)
def test_steps_that_cannot_begin_in_backward_run_after_it(arguments: dict[str, Any], sim: ModuleType) -> None:
    model, expected = mlp(device="sim"), mlp(device="sim")
    optimizer, plain = optimizer_for(model, **arguments), optimizer_for(expected, overlap="none")
    for step in range(6):
        for each, stepper in ((model, optimizer), (expected, plain)):
            stepper.zero_grad()
            with stepper.update_in_backward():
                loss_of(each, step).backward()
            stepper.step()
    assert_same_bits(result(model, optimizer), result(expected, plain))


# ---- what would make it wrong


@pytest.fixture
def trained(sim: ModuleType) -> tuple[nn.Sequential, offload.AdamW]:
    """After a step that taught it how gradients arrive; its next update begins in backward."""
    sim.configure("lazy")
    model = mlp(device="sim")
    optimizer = optimizer_for(model)
    one_step(model, optimizer, 0)
    return model, optimizer


def one_step(model: nn.Sequential, optimizer: offload.AdamW, step: int) -> None:
    optimizer.zero_grad()
    with optimizer.update_in_backward():
        loss_of(model, step).backward()
    optimizer.step()


def begin_step(model: nn.Sequential, optimizer: offload.AdamW) -> None:
    optimizer.zero_grad()
    with optimizer.update_in_backward():
        loss_of(model, 1).backward()


def expected_after_two_steps() -> object:
    model = mlp(device="sim")
    optimizer = optimizer_for(model, overlap="none")
    for step in range(2):
        one_step(model, optimizer, step)
    return result(model, optimizer)


Late = Callable[[nn.Sequential, offload.AdamW], object]


def scale(model: nn.Sequential, _: offload.AdamW) -> None:
    for param in model.parameters():
        assert param.grad is not None
        param.grad.mul_(0.5)


def unscale(model: nn.Sequential, optimizer: offload.AdamW) -> None:
    model[2].weight.norm()  # settles one subgroup: its gradients are ordinary tensors again
    scaler = torch.amp.GradScaler("sim", init_scale=1024.0)
    scaler.scale(torch.ones((), device="sim"))
    scaler.unscale_(optimizer)


def replace(model: nn.Sequential, _: offload.AdamW) -> None:
    model[0].weight.grad = torch.zeros_like(model[0].weight)


LATE: dict[str, tuple[Late, str]] = {
    "scaled in place": (scale, "8 gradients changed after"),
    "unscaled": (unscale, "8 gradients changed after"),
    "torch's clipping": (
        lambda model, _: nn.utils.clip_grad_norm_(model.parameters(), 1e-3),
        "8 gradients changed after",
    ),
    "replaced": (replace, "1 gradients changed after"),
    "zeroed": (lambda model, optimizer: optimizer.zero_grad(), "8 gradients changed after"),
    "learning rate": (lambda _, optimizer: optimizer.param_groups[0].update(lr=3e-3), "hyper-parameters changed"),
}


@pytest.mark.parametrize(("late", "message"), LATE.values(), ids=LATE)
def test_what_comes_too_late_is_an_error(
    late: Late, message: str, trained: tuple[nn.Sequential, offload.AdamW]
) -> None:
    model, optimizer = trained
    begin_step(model, optimizer)
    late(model, optimizer)
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert_same_bits(result(model, optimizer), expected_after_two_steps())
    optimizer.param_groups[0]["lr"] = HYPER["lr"]
    one_step(model, optimizer, 2)


def test_clipping_after_it_is_refused(trained: tuple[nn.Sequential, offload.AdamW]) -> None:
    model, optimizer = trained
    begin_step(model, optimizer)
    with pytest.raises(RuntimeError, match="the update has begun without the coefficient"):
        optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    assert_same_bits(result(model, optimizer), expected_after_two_steps())


def test_another_backward_is_stopped_before_it_changes_a_gradient(
    trained: tuple[nn.Sequential, offload.AdamW],
) -> None:
    model, optimizer = trained
    begin_step(model, optimizer)
    with pytest.raises(RuntimeError, match="accumulate before it"):
        loss_of(model, 2).backward()
    optimizer.step()
    assert_same_bits(result(model, optimizer), expected_after_two_steps())
    one_step(model, optimizer, 2)


def test_a_second_backward_within_is_stopped(trained: tuple[nn.Sequential, offload.AdamW]) -> None:
    model, optimizer = trained
    optimizer.zero_grad()
    losses = [loss_of(model, seed) for seed in (1, 2)]
    with (
        pytest.raises(RuntimeError, match=r"accumulate before it|modified by an inplace"),
        optimizer.update_in_backward(),
    ):
        [loss.backward() for loss in losses]
    with pytest.raises(RuntimeError, match="an earlier step failed half way"):
        optimizer.step()


def test_a_read_within_is_an_error_and_no_deadlock(trained: tuple[nn.Sequential, offload.AdamW]) -> None:
    model, optimizer = trained
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="leave the context first"), optimizer.update_in_backward():
        [do() for do in (lambda: loss_of(model, 1).backward(), model[0].weight.norm)]
    assert all(type(param) is nn.Parameter for param in model.parameters())


def test_it_must_be_ended(trained: tuple[nn.Sequential, offload.AdamW]) -> None:
    model, optimizer = trained
    begin_step(model, optimizer)
    with pytest.raises(RuntimeError, match="was not ended: call step"):
        begin_step(model, optimizer)
    begun = optimizer._in_backward
    assert begun is not None
    with pytest.raises(ValueError, match="the closure would run another backward pass"):
        optimizer.step(lambda: 0.0)


def test_nan_breaks(trained: tuple[nn.Sequential, offload.AdamW]) -> None:
    model, optimizer = trained
    optimizer.zero_grad()
    with optimizer.update_in_backward():
        (loss_of(model, 1) * float("nan")).backward()
    with pytest.raises(offload.NonFiniteGradientError, match="its update began in backward"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="an earlier step failed half way"):
        optimizer.synchronize()


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        raise ArithmeticError("backward failed")


def test_a_failed_backward_breaks_only_what_was_begun(trained: tuple[nn.Sequential, offload.AdamW]) -> None:
    model, optimizer = trained
    before = result(model, optimizer)
    with pytest.raises(ArithmeticError), optimizer.update_in_backward():
        Failing.apply(loss_of(model, 1)).backward()  # before any gradient
    optimizer.zero_grad()
    assert_same_bits(result(model, optimizer), before)
    one_step(model, optimizer, 1)
    assert_same_bits(result(model, optimizer), expected_after_two_steps())

    x = torch.randn(4, 16).to("sim").requires_grad_()
    with pytest.raises(ArithmeticError), optimizer.update_in_backward():
        model(Failing.apply(model[0](x) @ torch.ones(32, 16, device="sim"))).sum().backward()
    with pytest.raises(RuntimeError, match="an earlier step failed half way"):
        optimizer.step()


def test_skipping_steps_is_refused(sim: ModuleType) -> None:
    optimizer = optimizer_for(mlp(device="sim"), on_nonfinite="skip")
    with pytest.raises(ValueError, match="cannot skip a step"), optimizer.update_in_backward():
        pass


def test_ranks_are_refused(sim: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = optimizer_for(mlp(device="sim"))
    monkeypatch.setattr("offload.arguments.num_distributed_ranks", lambda: 2)
    with pytest.raises(ValueError, match="a program of 2 ranks"), optimizer.update_in_backward():
        pass
    with pytest.raises(ValueError, match="overlap='backward' in a program of 2 ranks"):
        optimizer_for(mlp(device="sim"), overlap="backward")


# ---- which gradients are final, and the order of the plan


def test_final_after_as_many_arrivals_as_in_the_last_pass() -> None:
    final = FinalGradients()
    assert not any(final.arrived(0, i, [0, 1]) for i in (0, 1, 1))
    final.end()
    assert [final.arrived(0, i, [0, 1]) for i in (1, 0, 1)] == [False, False, True]
    final.forget()
    assert [final.arrived(0, i, [0, 1]) for i in (1, 0, 1)] == [False, False, True]
    final.end()
    assert [final.arrived(0, i, [0, 1, 2]) for i in (1, 0, 1)] == [False] * 3, (
        "2 never got one, so it may get its first"
    )


def test_order_is_that_of_the_last_arrivals() -> None:
    final = FinalGradients()
    for index in (3, 1, 3, 2):
        final.arrived(index, 0, [0])
    final.end()
    assert final.order(5) == [1, 3, 2, 0, 4]
    assert final.order(3) == [1, 2, 0]


def test_plan_in_order_of_gradients() -> None:
    plan = Plan.parse("D0@0 P1@0 D2@1 C0@0 G1@0 F1@0 P3@0 C2@1 U0@0 G3@0 F3@0 U2@1 R4")
    reordered = in_order_of(plan, [4, 3, 2, 1, 0], num_slots=1)
    assert str(reordered) == "P3@0 R4 G3@0 F3@0 P1@0 D2@0 C2@0 G1@0 F1@0 D0@1 C0@1 U2@0 U0@1"
    assert reordered.placements == plan.placements
    reordered.validate(5, resident={4})
    assert find_hazards_in_backward([reordered] * 2, [Subgroup(i, 1, 2, 12) for i in range(5)]) == []
    assert Placement.RESIDENT in reordered.placements.values()


def test_slots_may_be_memory_that_the_compute_lane_has_just_freed(sim: ModuleType) -> None:
    """A state may come up before anything else has made the transfers wait for the compute lane."""
    sim.configure("lazy")
    optimizer = offload.AdamW([nn.Parameter(torch.ones(4096, device="sim"))], plan="device", num_slots=1)
    runtime = optimizer.runtime
    num_bytes = runtime.homes.slot_bytes(runtime.subgroups)
    runtime.pool.slots = []
    for _ in range(2):
        torch.zeros(num_bytes, dtype=torch.uint8, device="sim")  # written and freed at once
        runtime.memory.allocate_buffers(runtime.homes, runtime.subgroups)
        runtime.lanes.h2d.submit(runtime.subgroups[0].prefetch(runtime.pool.slots[0]))
    runtime.synchronize()
    assert sim.races() == []
