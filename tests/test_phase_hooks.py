"""Hooks report the phases of every kind of training loop, once each and in order."""

from __future__ import annotations

import copy
import pickle
import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from offload.phase_hooks import PhaseHooks


class Recorder:
    """Keeps each change of phase, as a monitor would: entering the current phase is no change."""

    def __init__(self) -> None:
        self.phases: list[str] = ["idle"]
        self.lock = threading.Lock()  # which can neither be copied nor pickled, as a monitor's

    def __call__(self, phase: str) -> None:
        if phase != self.phases[-1]:
            self.phases.append(phase)

    def take(self) -> list[str]:
        """The changes since the last call."""
        taken, self.phases = self.phases[1:], self.phases[-1:]
        return taken


@dataclass
class Output:
    loss: Tensor
    logits: list[Tensor]


class TokenModel(nn.Module):
    """Integer tokens in, so no input needs a gradient; the output is shaped as ``kind`` says."""

    def __init__(self, kind: str = "tensor") -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.linear = nn.Linear(4, 3)
        self.kind = kind

    def forward(self, tokens: Tensor) -> Any:
        logits = self.linear(self.embedding(tokens))
        if self.kind == "error":
            raise RuntimeError("no forward today")
        outputs = {
            "tensor": logits,
            "tuple": (None, logits),
            "dict": {"loss": logits.mean(), "cache": {"logits": logits}},
            "dataclass": Output(logits.mean(), [logits]),
        }
        return outputs[self.kind]


TOKENS = torch.tensor([[0, 1, 2]])
STEP = ["forward", "backward", "idle", "update", "idle"]


def loss_of(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output.square().mean()
    if isinstance(output, tuple):
        return loss_of(output[1])
    return output["loss"] if isinstance(output, dict) else output.loss


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def attach(recorder: Recorder, model: nn.Module) -> tuple[PhaseHooks, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hooks = PhaseHooks(recorder)
    hooks.install(model, optimizer)
    return hooks, optimizer


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict", "dataclass"])
def test_training_step(recorder: Recorder, kind: str) -> None:
    model = TokenModel(kind)
    _, optimizer = attach(recorder, model)
    for _ in range(2):
        loss_of(model(TOKENS)).backward()
        optimizer.step()
        assert recorder.take() == STEP


def test_backward_lasts_until_the_first_parameter_has_its_gradient(recorder: Recorder) -> None:
    model = TokenModel()
    attach(recorder, model)
    seen: list[str] = []
    model.embedding.weight.register_hook(lambda grad: seen.append(recorder.phases[-1]))
    loss_of(model(TOKENS)).backward()
    assert seen == ["backward"]


def test_loss_is_part_of_forward(recorder: Recorder) -> None:
    model = TokenModel()
    attach(recorder, model)
    loss = loss_of(model(TOKENS))
    assert recorder.take() == ["forward"]
    loss.backward()
    assert recorder.take() == ["backward", "idle"]


def test_gradient_accumulation(recorder: Recorder) -> None:
    model = TokenModel()
    _, optimizer = attach(recorder, model)
    for _ in range(3):
        loss_of(model(TOKENS)).backward()
    optimizer.step()
    assert recorder.take() == ["forward", "backward", "idle"] * 3 + ["update", "idle"]


def test_second_backward_through_the_same_graph(recorder: Recorder) -> None:
    model = TokenModel()
    attach(recorder, model)
    loss = loss_of(model(TOKENS))
    loss.backward(retain_graph=True)
    loss.backward()
    assert recorder.take() == ["forward", "backward", "idle", "backward", "idle"]


def test_evaluation_ends_with_the_forward_pass(recorder: Recorder) -> None:
    model = TokenModel()
    attach(recorder, model)
    with torch.no_grad():
        model(TOKENS)
    assert recorder.take() == ["forward", "idle"]


def test_forward_that_raises_ends(recorder: Recorder) -> None:
    model = TokenModel("error")
    attach(recorder, model)
    with pytest.raises(RuntimeError, match="no forward today"):
        model(TOKENS)
    assert recorder.take() == ["forward", "idle"]


def test_next_forward_is_seen_after_a_backward_that_raised(recorder: Recorder) -> None:
    model = TokenModel()
    attach(recorder, model)

    def fail(grad: Tensor) -> Tensor:
        raise RuntimeError("no backward today")

    handle = model.linear.weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="no backward today"):
        loss_of(model(TOKENS)).backward()
    handle.remove()
    recorder.take()
    loss_of(model(TOKENS)).backward()
    assert recorder.take() == ["forward", "backward", "idle"]


def test_recomputation_is_part_of_backward(recorder: Recorder) -> None:
    model = TokenModel()
    attach(recorder, model)
    loss_of(checkpoint(model, TOKENS, use_reentrant=False)).backward()
    assert recorder.take() == ["forward", "backward", "idle"]


def test_evaluation_inside_backward_is_part_of_it(recorder: Recorder) -> None:
    model = TokenModel()
    attach(recorder, model)

    def evaluate(grad: Tensor) -> None:
        with torch.no_grad():
            model(TOKENS)
        assert recorder.phases[-1] == "backward"

    model.linear.weight.register_hook(evaluate)
    loss_of(model(TOKENS)).backward()
    assert recorder.take() == ["forward", "backward", "idle"]


def test_removed_hooks_report_nothing_more(recorder: Recorder) -> None:
    model = TokenModel()
    hooks, optimizer = attach(recorder, model)
    loss = loss_of(model(TOKENS))
    recorder.take()
    hooks.remove()
    loss.backward()  # the hook on its output is still there
    optimizer.step()
    model(TOKENS)
    assert recorder.take() == []


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deep", "pickle"]
)
def test_copies_of_the_model_are_not_followed(recorder: Recorder, copied: Any) -> None:
    model = TokenModel()
    attach(recorder, model)
    loss_of(copied(model)(TOKENS)).backward()
    assert recorder.take() == []


def test_results_are_untouched() -> None:
    torch.manual_seed(0)
    plain = TokenModel("dict")
    followed = copy.deepcopy(plain)
    attach(Recorder(), followed)
    losses = [loss_of(model(TOKENS)) for model in (plain, followed)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for expected, got in zip(plain.parameters(), followed.parameters(), strict=True):
        assert torch.equal(expected.grad, got.grad)
