"""Buffers for the kernels' tests, with values chosen to tell implementations apart."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from offload.kernels import AdamScalars, adam_step

SPECIAL = [
    *(0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-42, 1.1754942e-38, 1.1754944e-38, -3e-23, 1e-19, 5.96e-8, 6.1e-5),
    *(1 / 3, 65504.0, 65519.0, 65520.0, 1e30, -3e38, 3.4028235e38, float("inf"), float("-inf"), float("nan")),
]


def adversarial(numel: int, generator: torch.Generator) -> Tensor:
    """fp32: ordinary values, special values, and random bits (every exponent, every NaN), a third each."""
    kind = torch.randint(3, (numel,), generator=generator)
    special = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (numel,), generator=generator)]
    bits = torch.randint(-(2**31), 2**31, (numel,), generator=generator).to(torch.int32).view(torch.float32)
    ordinary = torch.randn(numel, generator=generator)
    return torch.where(kind == 0, ordinary, torch.where(kind == 1, special, bits))


@dataclass
class Buffers:
    """The tensor arguments of adam_step."""

    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    grad: Tensor
    param_out: Tensor | None
    max_exp_avg_sq: Tensor | None

    @classmethod
    def adversarial(
        cls,
        numel: int,
        grad_dtype: torch.dtype = torch.float32,
        out_dtype: torch.dtype | None = None,
        *,
        amsgrad: bool = False,
        seed: int = 0,
    ) -> Buffers:
        """Values that tell implementations apart. Second moments are not negative, as in training."""
        generator = torch.Generator().manual_seed(seed)
        master, exp_avg, exp_avg_sq, grad, maximum = (adversarial(numel, generator) for _ in range(5))
        return cls(
            master,
            exp_avg,
            exp_avg_sq.abs(),
            grad.to(grad_dtype),
            None if out_dtype is None else torch.full((numel,), 7.0, dtype=out_dtype),
            maximum.abs() if amsgrad else None,
        )

    @classmethod
    def ordinary(
        cls,
        numel: int,
        grad_dtype: torch.dtype = torch.float32,
        out_dtype: torch.dtype | None = None,
        *,
        amsgrad: bool = False,
        seed: int = 0,
    ) -> Buffers:
        """Values as in training, over a few orders of magnitude."""
        generator = torch.Generator().manual_seed(seed)
        master, exp_avg, grad, spread = (torch.randn(numel, generator=generator) for _ in range(4))
        second = (torch.rand(numel, generator=generator) * 1e-2 for _ in range(2))
        return cls(
            master,
            exp_avg * 1e-2,
            next(second),
            (grad * 1e-2 * spread.exp()).to(grad_dtype),
            None if out_dtype is None else torch.full((numel,), 7.0, dtype=out_dtype),
            next(second) if amsgrad else None,
        )

    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.master, self.exp_avg, self.exp_avg_sq, self.grad, self.param_out, self.max_exp_avg_sq)

    def map(self, change: Callable[[Tensor], Tensor]) -> Buffers:
        return Buffers(*(None if tensor is None else change(tensor) for tensor in self.tensors()))

    def clone(self) -> Buffers:
        return self.map(torch.clone)

    def step(self, *scalars: AdamScalars, **options: object) -> Buffers:
        """Takes these steps in place."""
        for each in scalars:
            adam_step(*self.tensors(), scalars=each, **options)
        return self

    def assert_same_bits(self, other: Buffers, note: object = "") -> None:
        """Equal as integers, except that any NaN equals any NaN."""
        for name, ours, theirs in zip(self.__dataclass_fields__, self.tensors(), other.tensors(), strict=True):
            if ours is None or theirs is None:
                assert ours is theirs, f"{note} {name}"
                continue
            assert ours.dtype == theirs.dtype, f"{note} {name}"
            integer = torch.int32 if ours.itemsize == 4 else torch.int16
            differs = (ours.view(integer) != theirs.view(integer)) & ~(ours.isnan() & theirs.isnan())
            if differs.any():
                at = int(differs.nonzero()[0])
                count = f"{int(differs.sum())} of {ours.numel()} differ"
                pytest.fail(f"{note} {name}: {count}, first [{at}]: {float(ours[at])!r} != {float(theirs[at])!r}")


@pytest.fixture(scope="session")
def buffers() -> type[Buffers]:
    return Buffers


def _scalars(steps: Iterable[int] = (1, 2, 3), **changes: object) -> list[AdamScalars]:
    arguments = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "decoupled": True, **changes}
    return [AdamScalars.at_step(step=step, **arguments) for step in steps]


@pytest.fixture(scope="session")
def make_scalars() -> Callable[..., list[AdamScalars]]:
    """Scalars of some steps: AdamW's defaults with decay 0.1, changed by keyword."""
    return _scalars


@pytest.fixture(scope="session")
def modes() -> dict[str, dict[str, object]]:
    """Arguments of AdamScalars.at_step that take every branch of the formula between them."""
    return {
        "adamw": {"grad_scale": 0.37},
        "adam": {"decoupled": False, "maximize": True},
        "no decay": {"weight_decay": 0.0, "decoupled": False},
        "from gradient": {"betas": (0.3, 0.95), "grad_scale": 3.0},
        "no momentum": {"betas": (0.0, 0.0), "eps": 0.0},
    }


FORMATS = list(
    itertools.product(
        (torch.float32, torch.bfloat16, torch.float16), (None, torch.float32, torch.bfloat16, torch.float16)
    )
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``formats``: every pairing of gradient and copy dtype."""
    if "formats" in metafunc.fixturenames:
        names = [f"{grad}-{out}".replace("torch.", "") for grad, out in FORMATS]
        metafunc.parametrize("formats", FORMATS, ids=names)
