"""Small trainings whose every bit is compared: models, data, loops, and what is left when they end."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import offload
from offload import Placement, Plan

NUM_STEPS = 20
BATCH = 8
WIDTHS = (16, 32, 48, 32, 16)  # every parameter's numel is a multiple of 16: see tests/test_bits.py
ODD_WIDTHS = (5, 33, 17, 29, 23, 19, 3)


def mlp(
    widths: tuple[int, ...] = WIDTHS, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> nn.Sequential:
    """Linear layers with tanh between; the same values on every device."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for num_in, num_out in itertools.pairwise(widths):
        layers += [nn.Linear(num_in, num_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(device=device, dtype=dtype)


class TiedModel(nn.Module):
    """Token embedding and output projection share one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.embedding(tokens)))


def loss_of(model: nn.Sequential, step: int) -> Tensor:
    """A loss that depends on ``step``, on the model's device and in its dtype."""
    first, last = model[0].weight, model[-1].weight
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(BATCH, first.shape[1], generator=generator).to(first.device, first.dtype)
    y = torch.randn(BATCH, last.shape[0], generator=generator).to(first.device, first.dtype)
    return (model(x) - y).square().mean()


class Trained(NamedTuple):
    """Losses of all steps and, at the end, parameters by name, all on the CPU."""

    losses: list[Tensor]
    params: dict[str, Tensor]


BeforeStep = Callable[[int], object]


def train(
    model: nn.Sequential,
    optimizer: torch.optim.Optimizer,
    *,
    steps: range = range(NUM_STEPS),
    before_step: BeforeStep = lambda step: None,
) -> Trained:
    """``before_step(step)`` runs between backward and ``optimizer.step()``."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        before_step(step)
        optimizer.step()
        losses.append(loss.detach())
    return Trained([loss.cpu() for loss in losses], snapshot(model))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().cpu().clone() for name, param in model.named_parameters()}


def state_snapshot(optimizer: torch.optim.Optimizer) -> dict[tuple[object, str], Tensor]:
    """Every tensor of ``state_dict()["state"]``, copied to the CPU."""
    entries = optimizer.state_dict()["state"].items()
    return {(index, name): value.detach().cpu().clone() for index, entry in entries for name, value in entry.items()}


def bits(tensor: Tensor) -> Tensor:
    integer = {4: torch.int32, 2: torch.int16, 1: torch.int8}[tensor.itemsize]
    return tensor.detach().cpu().contiguous().view(integer)


def assert_same_bits(actual: object, expected: object, where: str = "") -> None:
    """Equality of every bit of tensors in nested tuples, lists and dicts: -0.0 is not 0.0."""
    if isinstance(expected, Tensor):
        assert isinstance(actual, Tensor)
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), where
        num_wrong = int((bits(actual) != bits(expected)).sum())
        assert num_wrong == 0, f"{num_wrong} of {expected.numel()} elements differ at {where or 'the top'}"
        return
    if isinstance(expected, dict):
        assert isinstance(actual, dict)
        assert actual.keys() == expected.keys(), where
        pairs = [(key, actual[key], value) for key, value in expected.items()]
    else:
        assert isinstance(actual, (list, tuple)) and isinstance(expected, (list, tuple))  # noqa: PT018
        pairs = [(i, a, e) for i, (a, e) in enumerate(zip(actual, expected, strict=True))]
    for key, a, e in pairs:
        assert_same_bits(a, e, f"{where}[{key!r}]")


def random_plan(optimizer: offload.Adam, rng: random.Random) -> Plan:
    """Any placements in any order; states that live on the device stay there."""
    homes = optimizer.runtime.homes
    placements = [
        Placement.RESIDENT if i in homes.residents else rng.choice([Placement.HOST, Placement.DEVICE])
        for i in range(len(optimizer.runtime.subgroups))
    ]
    order = rng.sample(range(len(placements)), len(placements))
    return offload.lower(placements, num_slots=homes.num_slots, num_staging=homes.num_staging, order=order)


def replan_every_step(optimizer: offload.Adam, seed: int) -> BeforeStep:
    rng = random.Random(seed)
    return lambda step: optimizer.set_plan(random_plan(optimizer, rng))
