"""Checkpoints that are written while training goes on: of one step, whatever is slow; and what fails is heard of."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import offload
from offload import BudgetError, Static, Stride
from offload.adam import AdamSubgroup
from offload.snapshot import Copier
from offload.tensor_file import TensorFileWriter
from tests.training import assert_same_bits, loss_of, mlp, snapshot, state_snapshot, train

pytestmark = pytest.mark.usefixtures("one_torch_thread")

FIRST, REST = range(3), range(3, 6)
SOON_S = 60  # before which nothing here may time out


def make(device: str = "cpu", plan: Any = "host", **kwargs: Any) -> tuple[nn.Sequential, offload.AdamW]:
    model = mlp(dtype=torch.bfloat16, device=device)
    return model, offload.AdamW(model.parameters(), plan=plan, **{"lr": 3e-3, "subgroup_numel": 200, **kwargs})


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    return snapshot(model), state_snapshot(optimizer)


def loaded(path: Path, **kwargs: Any) -> Any:
    model, optimizer = make(**kwargs)
    offload.load(path, optimizer, model)
    return everything(model, optimizer)


class Gate:
    """Holds the copying thread before the first copy, until an update waits for it (or for good)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, opened_by: tuple[type, str] | None) -> None:
        self.open = threading.Event()
        self.passed_by_waiting = False
        copy = Copier._copy

        def held(copier: Copier, *args: Any) -> None:
            assert self.open.wait(SOON_S)
            copy(copier, *args)

        monkeypatch.setattr(Copier, "_copy", held)
        if opened_by is not None:
            waits = getattr(*opened_by)

            def opening(waiting: Any) -> None:
                self.passed_by_waiting = True
                self.open.set()
                waits(waiting)

            monkeypatch.setattr(*opened_by, opening)


# ---- of one step


@pytest.mark.parametrize("state_format", ["fp32", "split16", "int8"])
@pytest.mark.parametrize("overlap", ["none", "next_forward", "backward"])
@pytest.mark.parametrize("plan", ["host", Static(0.5), Stride(2)], ids=str)
def test_updates_wait_for_the_copy(
    sim: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: Any, overlap: Any, state_format: str
) -> None:
    """Nothing is copied before an update is about to overwrite something; three steps later it is of the first."""
    model, optimizer = make("sim", plan, overlap=overlap, state_format=state_format)
    train(model, optimizer, steps=FIRST)
    want = everything(model, optimizer)
    gate = Gate(monkeypatch, opened_by=(AdamSubgroup, "await_copy"))
    saving = offload.save(tmp_path / "a", optimizer, model, asynchronous=True)
    trained = train(model, optimizer, steps=REST)
    gate.open.set()
    saving.result(SOON_S)
    assert_same_bits(loaded(tmp_path / "a", state_format=state_format), want)
    assert sim.races() == []
    undisturbed, its_optimizer = make("sim", plan, overlap=overlap, state_format=state_format)
    train(undisturbed, its_optimizer, steps=FIRST)
    assert_same_bits(train(undisturbed, its_optimizer, steps=REST), trained)


@pytest.mark.parametrize("state_format", ["fp32", "int8"])
def test_updates_on_the_cpu_wait_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state_format: str) -> None:
    model, optimizer = make(state_format=state_format)
    train(model, optimizer, steps=FIRST)
    want = everything(model, optimizer)
    gate = Gate(monkeypatch, opened_by=(AdamSubgroup, "await_copy"))
    saving = offload.save(tmp_path / "a", optimizer, model, asynchronous=True)
    train(model, optimizer, steps=REST)
    assert gate.passed_by_waiting
    saving.result(SOON_S)
    assert_same_bits(loaded(tmp_path / "a", state_format=state_format), want)


def test_with_room_for_all_training_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = make()
    train(model, optimizer, steps=FIRST)
    want = everything(model, optimizer)
    disk, write = threading.Event(), TensorFileWriter.write

    def slow_write(writer: TensorFileWriter, *args: Any) -> None:
        assert disk.wait(SOON_S)
        write(writer, *args)

    monkeypatch.setattr(TensorFileWriter, "write", slow_write)
    saving = offload.save(tmp_path / "a", optimizer, model, asynchronous=True, copy_budget="1GiB")
    train(model, optimizer, steps=REST)
    assert not saving.done()
    disk.set()
    saving.result(SOON_S)
    assert saving.done()
    assert_same_bits(loaded(tmp_path / "a"), want)


def test_what_forward_changes_is_copied_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = offload.AdamW(model.parameters())
    model(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    want = {name: value.clone() for name, value in model.state_dict().items() if "running" in name}
    gate = Gate(monkeypatch, opened_by=None)
    saving = offload.save(tmp_path / "a", optimizer, model, asynchronous=True)
    model(torch.randn(8, 4))
    gate.open.set()
    saving.result(SOON_S)
    offload.load(tmp_path / "a", optimizer, model)
    assert_same_bits({name: model.state_dict()[name] for name in want}, want)


# ---- memory


def test_copies_are_on_the_bill_until_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = make()
    train(model, optimizer, steps=FIRST)
    largest = max(s.state_bytes + s.param_bytes for s in optimizer.runtime.subgroups)
    before = optimizer.bill
    gate = Gate(monkeypatch, opened_by=None)
    saving = offload.save(tmp_path / "a", optimizer, model, asynchronous=True)
    assert optimizer.bill.snapshot_bytes == 2 * largest
    assert optimizer.bill.host_bytes == before.host_bytes + 2 * largest
    gate.open.set()
    saving.result(SOON_S)
    assert optimizer.bill == before


def test_budgets_that_hold_no_copy_are_refused(tmp_path: Path) -> None:
    model, optimizer = make(host_budget=make()[1].bill.host_bytes + 100)
    train(model, optimizer, steps=FIRST)
    with pytest.raises(BudgetError, match=r"host_budget is .* snapshot"):
        offload.save(tmp_path / "a", optimizer, model, asynchronous=True)
    with pytest.raises(BudgetError, match="copy_budget is 100 B and one copy of the largest subgroup takes"):
        offload.save(tmp_path / "a", optimizer, model, asynchronous=True, copy_budget=100)
    train(model, optimizer, steps=REST)
    offload.save(tmp_path / "a", optimizer, model)


# ---- errors are heard of


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TensorFileWriter, "write", fail)


def failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model, its optimizer, and a save that a full disk ended, over a checkpoint of an earlier step."""
    model, optimizer = make()
    train(model, optimizer, steps=FIRST)
    offload.save(tmp_path / "a", optimizer, model)
    want = everything(model, optimizer)
    with monkeypatch.context() as patch:
        full_disk(patch)
        saving = offload.save(tmp_path / "a", optimizer, model, asynchronous=True)
        with pytest.raises(OSError, match="No space"):
            saving.future.result(SOON_S)
    assert len([*(tmp_path / "a").iterdir()]) == 2
    assert_same_bits(loaded(tmp_path / "a"), want)
    assert optimizer.bill.snapshot_bytes == 0
    return model, optimizer, saving


def test_a_failure_is_raised_by_the_next_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, _ = failed(tmp_path, monkeypatch)
    before = everything(model, optimizer)
    loss_of(model, 7).backward()
    with pytest.raises(
        RuntimeError, match=r"failed: .*No space left .* This step changed nothing: call step\(\) again"
    ):
        optimizer.step()
    assert_same_bits(everything(model, optimizer), before)
    optimizer.step()
    train(model, optimizer, steps=REST)


def test_a_failure_that_was_heard_of_is_not_raised_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, saving = failed(tmp_path, monkeypatch)
    with pytest.raises(OSError, match="No space"):
        saving.result(SOON_S)
    train(model, optimizer, steps=REST)


def test_a_failure_is_raised_by_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, _ = failed(tmp_path, monkeypatch)
    with pytest.raises(OSError, match="No space"):
        offload.save(tmp_path / "a", optimizer, model, asynchronous=True)
    offload.save(tmp_path / "a", optimizer, model, asynchronous=True).result(SOON_S)


def test_training_does_not_wait_for_a_save_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while the copies wait for a buffer that nobody empties any more."""
    model, optimizer = make(subgroup_numel=1)
    train(model, optimizer, steps=FIRST)
    full_disk(monkeypatch)
    gate = Gate(monkeypatch, opened_by=(AdamSubgroup, "await_copy"))
    saving = offload.save(tmp_path / "a", optimizer, model, asynchronous=True)
    loss_of(model, 7).backward()
    optimizer.step()
    assert gate.passed_by_waiting
    with pytest.raises(OSError, match="No space"):
        saving.result(SOON_S)


def test_an_error_in_copying_is_the_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = make()
    train(model, optimizer, steps=FIRST)

    def fail(*args: Any) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr(Copier, "_copy", fail)
    saving = offload.save(tmp_path / "a", optimizer, model, asynchronous=True)
    with pytest.raises(RuntimeError, match="device lost"):
        saving.result(SOON_S)
    train(model, optimizer, steps=REST)


# ---- changes by others than step()


def test_a_change_of_a_parameter_that_was_not_copied_fails_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = make()
    train(model, optimizer, steps=FIRST)
    gate = Gate(monkeypatch, opened_by=None)
    saving = offload.save(tmp_path / "a", optimizer, model, asynchronous=True)
    with torch.no_grad():
        model[2].weight.fill_(1.0)
    gate.open.set()
    with pytest.raises(
        RuntimeError, match=r"parameter .* was changed while it was copied .* optimizer\.synchronize\(\)"
    ):
        saving.result(SOON_S)
    train(model, optimizer, steps=REST)


@pytest.mark.parametrize("how", ["wait_copied", "synchronize"])
def test_waiting_for_the_copies_lets_parameters_be_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    model, optimizer = make()
    train(model, optimizer, steps=FIRST)
    want = everything(model, optimizer)
    gate = Gate(monkeypatch, opened_by=(Copier, "wait"))
    saving = offload.save(tmp_path / "a", optimizer, model, asynchronous=True)
    (saving if how == "wait_copied" else optimizer).__getattribute__(how)()
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(1.0)
    gate.open.set()
    saving.result(SOON_S)
    assert_same_bits(loaded(tmp_path / "a"), want)


def test_a_step_that_leaves_a_parameter_out_waits_for_its_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not pending, so the user may change it right after the step."""
    model, optimizer = make()
    train(model, optimizer, steps=FIRST)
    want = everything(model, optimizer)
    gate = Gate(monkeypatch, opened_by=(Copier, "wait"))
    saving = offload.save(tmp_path / "a", optimizer, model, asynchronous=True)
    optimizer.zero_grad()
    loss_of(model, 7).backward()
    model[6].bias.grad = None
    optimizer.step()
    assert gate.passed_by_waiting
    with torch.no_grad():
        model[6].bias.fill_(1.0)
    saving.result(SOON_S)
    assert_same_bits(loaded(tmp_path / "a"), want)


def test_a_change_of_a_frozen_weight_before_it_is_written_fails_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = offload.AdamW(model[2:].parameters())
    gate = Gate(monkeypatch, opened_by=None)
    saving = offload.save(tmp_path / "a", optimizer, model, asynchronous=True)
    model[0].weight.zero_()
    gate.open.set()
    with pytest.raises(RuntimeError, match=r"'0\.weight' was changed before a snapshot had written it"):
        saving.result(SOON_S)


# ---- the rest


def test_saves_follow_each_other(tmp_path: Path) -> None:
    model, optimizer = make()
    for step in range(4):
        train(model, optimizer, steps=range(step, step + 1))
        saving = offload.save(tmp_path / "a", optimizer, model, extra={"step": step}, asynchronous=True)
    want = everything(model, optimizer)
    saving.result(SOON_S)
    assert_same_bits(loaded(tmp_path / "a"), want)


def test_a_save_that_is_not_asynchronous_is_done(tmp_path: Path) -> None:
    model, optimizer = make()
    saving = offload.save(tmp_path / "a", optimizer, model)
    assert saving.done()
    saving.result()
    saving.wait_copied()


def test_torchs_optimizers_are_saved_in_place_only(tmp_path: Path) -> None:
    model = mlp()
    with pytest.raises(ValueError, match="asynchronous=True needs an optimizer of this package, not AdamW"):
        offload.save(tmp_path / "a", torch.optim.AdamW(model.parameters()), model, asynchronous=True)
