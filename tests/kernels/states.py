"""Steps of every rule over every state format, with values chosen to tell implementations apart."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from offload.kernels import (
    STATE_FORMATS,
    AdagradScalars,
    AdamScalars,
    LionScalars,
    Rounding,
    Scalars,
    SGDScalars,
    State,
    update,
)
from offload.kernels.state import num_blocks, row_dtypes
from tests.kernels.conftest import adversarial

ADAM = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
SGD = {"lr": 1e-2, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.1, "nesterov": False}


def _adam(**changes: object) -> list[Scalars]:
    return [AdamScalars.at_step(step=step, **{**ADAM, "decoupled": True, **changes}) for step in (1, 2, 1000)]


def _sgd(**changes: object) -> list[Scalars]:
    return [SGDScalars.at_step(step=step, **{**SGD, **changes}) for step in (1, 2, 1000)]


# By name: the moments that are kept, and the scalars of some steps.
RULES: dict[str, tuple[tuple[str, ...], list[Scalars]]] = {
    "adamw": (("first", "second"), _adam(grad_scale=0.37)),
    "adam": (("first", "second"), _adam(decoupled=False, maximize=True, betas=(0.3, 0.95))),
    "amsgrad": (("first", "second", "max_second"), _adam()),
    "lion": (("first",), [LionScalars.at_step(lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, grad_scale=0.37)] * 3),
    "adagrad": (
        ("second",),
        [
            AdagradScalars.at_step(lr=1e-2, lr_decay=0.1, eps=1e-10, weight_decay=decay, step=step, maximize=decay > 0)
            for step, decay in ((1, 0.0), (2, 0.1), (1000, 0.1))
        ],
    ),
    "sgd": ((), _sgd(momentum=0.0)),
    "momentum": (("first",), _sgd(dampening=0.3, weight_decay=0.0, maximize=True)),
    "nesterov": (("first",), _sgd(nesterov=True, grad_scale=0.37)),
}


@dataclass
class Case:
    """One state, its gradient and parameter, and the steps to take."""

    name: str
    state: State
    grad: Tensor
    param: Tensor | None
    scalars: list[Scalars]
    roundings: list[Rounding]


def clone(case: Case) -> Case:
    param = None if case.param is None else case.param.clone()
    return replace(case, state=copy_state(case.state), grad=case.grad.clone(), param=param)


def copy_state(state: State, offset: int = 0) -> State:
    """A copy that begins ``offset`` elements after an aligned address."""

    def copy(tensor: Tensor) -> Tensor:
        return torch.cat([tensor.new_zeros(offset), tensor])[offset:]

    return State(state.format, *(None if t is None else copy(t) for t in state.tensors()))


def make_case(
    rule: str,
    state_format: str,
    numel: int,
    *,
    grad_dtype: torch.dtype = torch.bfloat16,
    param_dtype: torch.dtype | None = torch.bfloat16,
    seed: int = 0,
    is_adversarial: bool = True,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    moments, scalars = RULES[rule]
    dtypes = row_dtypes(state_format)

    def values(size: int) -> Tensor:
        return adversarial(size, generator) if is_adversarial else torch.randn(size, generator=generator)

    fields: dict[str, Tensor] = {}
    for name in ("master", *moments):
        dtype = dtypes[name]
        if dtype.is_floating_point:
            fields[name] = values(numel).to(dtype)
            if name != "master" and name != "first":
                fields[name] = fields[name].abs()
            if name == "second" and state_format != "fp32":  # the sign of some belongs to the remainder
                fields[name] *= 1 - 2 * torch.randint(2, (numel,), generator=generator).to(dtype)
        else:
            info = torch.iinfo(dtype)
            fields[name] = torch.randint(max(info.min, -(2**15)), info.max + 1, (numel,), generator=generator).to(dtype)
        if name == "second" and fields["master"].dtype == torch.int16:  # no state: the sign stands beside 32767 alone,
            fields["master"][(fields["master"] == -1) & (fields[name] < 0)] = 0  # and one more than -1 carries
        if dtype.itemsize == 1:
            fields[f"{name}_scale"] = values(num_blocks(numel)).abs() * 1e-4
    return Case(
        f"{rule} {state_format} {numel} {grad_dtype} {param_dtype}",
        State(state_format, **fields),
        values(numel).to(grad_dtype),
        None if param_dtype is None else values(numel).to(param_dtype),
        scalars,
        [Rounding.at_step(seed, step, first_index=2**32 - 1000) for step in (1, 2, 1000)],
    )


def is_possible(rule: str, state_format: str) -> bool:
    return rule != "amsgrad" or state_format in ("fp32", "split16")


def every_case(numel: int, rules: object = RULES, seed: int = 0) -> Iterator[Case]:
    """Every rule in every format, with adversarial and with ordinary values; compact ones with bfloat16 gradients."""
    for rule, state_format, is_adversarial in itertools.product(rules, STATE_FORMATS, (False, True)):
        if is_possible(rule, state_format):
            yield make_case(rule, state_format, numel, seed=seed, is_adversarial=is_adversarial)


def run(case: Case, implementation: str, **options: object) -> Case:
    """Takes the case's steps in place."""
    for scalars, rounding in zip(case.scalars, case.roundings, strict=True):
        update(
            case.state,
            case.grad,
            case.param,
            scalars=scalars,
            rounding=rounding,
            implementation=implementation,
            **options,
        )
    return case


def assert_same_bits(ours: Case, theirs: Case, note: str = "") -> None:
    """Equal as integers, except that any NaN equals any NaN."""
    pairs = [(name, a, b) for (name, a), (_, b) in zip(ours.state.items(), theirs.state.items(), strict=True)]
    if ours.param is not None and theirs.param is not None:
        pairs.append(("param", ours.param, theirs.param))
    for name, a, b in pairs:
        integer = {4: torch.int32, 2: torch.int16, 1: torch.int8}[a.itemsize]
        differs = (a.view(integer) != b.view(integer)) & ~(a.isnan() & b.isnan())
        if differs.any():
            at = int(differs.nonzero()[0])
            raise AssertionError(
                f"{note} {ours.name} {name}: {int(differs.sum())} of {a.numel()} differ, first [{at}]: "
                f"{a[at].item()!r} != {b[at].item()!r}"
            )
