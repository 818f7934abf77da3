"""What is the same for every element of an Adam step, and what such scalars of any rule have in common."""

from __future__ import annotations

import ctypes
import math
import struct
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar

from offload.kernels.arithmetic import denormals_kept


def to_float32(value: float) -> float:
    """``value`` rounded to fp32 once."""
    return ctypes.c_float(value).value


@dataclass(frozen=True, slots=True, eq=False)
class Scalars:
    """Base of the scalars of each rule: fields are floats that fp32 represents exactly, then flags.

    Equal and hashed by their bits: 0.0 and -0.0 give other results, so they are not the same scalars.

    Attributes:
        rule: the name of the rule that they belong to.
        packed: the struct of that rule in csrc/cpu_adam/scalars.h.
    """

    rule: ClassVar[str]
    grad_multiplier: float
    packed: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        layout = "".join("i" if each.type == "bool" else "f" for each in _given(type(self)))
        with denormals_kept():  # a conversion from double, even of a value that fits, is arithmetic too
            object.__setattr__(self, "packed", struct.pack(layout, *self._values()))

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and isinstance(other, Scalars) and self.packed == other.packed

    def __hash__(self) -> int:
        return hash(self.packed)

    def _values(self) -> list[float | bool]:
        return [getattr(self, each.name) for each in _given(type(self))]

    def to_list(self) -> list[float]:
        """What they were made of, in order, as the ``float[]`` argument of a torch operator."""
        return [float(value) for value in self._values()]

    @classmethod
    def from_list(cls, values: list[float]) -> Scalars:
        """The inverse of :meth:`to_list`."""
        return cls(*(bool(v) if f.type == "bool" else v for f, v in zip(_given(cls), values, strict=True)))


def _given(scalars: type[Scalars]) -> list[Field[Any]]:
    """The fields that are given to the constructor: all but ``packed``."""
    return [each for each in fields(scalars) if each.init]


@dataclass(frozen=True, slots=True, eq=False)
class AdamScalars(Scalars):
    """The scalars of one Adam step, as the kernels use them: every float is exactly representable in fp32.

    Build them with :meth:`at_step`, which computes in float64 and rounds to fp32 once, in the order of torch's fused
    CPU kernels. Hashable, so a schedule may cache by them.
    """

    rule: ClassVar[str] = "adam"

    grad_multiplier: float
    """Multiplied into the gradient: unscaling and clipping, negated to maximize."""
    l2_decay: float
    """The gradient gets ``+ l2_decay * p``; 0 when the decay is decoupled or absent."""
    param_decay: float
    """The parameter is multiplied by it; 1 when the decay is L2 or absent."""
    lerp_weight: float
    """``exp_avg = fma(lerp_weight, g - exp_avg, exp_avg)``, or ``..., g)`` with ``lerp_from_grad``."""
    beta2: float
    one_minus_beta2: float
    sqrt_bias_correction2: float
    """``sqrt(1 - beta2**step)``."""
    eps: float
    neg_step_size: float
    """``-(lr / (1 - beta1**step))``."""
    lerp_from_grad: bool
    """True for beta1 <= 0.5, where torch interpolates from the other end, with weight ``-beta1``."""

    @classmethod
    def at_step(
        cls,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        step: int,
        decoupled: bool,
        maximize: bool = False,
        grad_scale: float = 1.0,
    ) -> AdamScalars:
        """Scalars of step number ``step`` (the first is 1).

        ``decoupled`` chooses AdamW's weight decay, else Adam's (L2). Gradients are multiplied by ``grad_scale``: give
        ``clip_coefficient / loss_scale``. It may be any float, NaN included, which then reaches every element.

        Raises ValueError for hyper-parameters that torch.optim.AdamW refuses, and for a step below 1.
        """
        beta1, beta2 = betas
        check_finite(lr=lr, eps=eps, weight_decay=weight_decay)
        check_fractions(**{"betas[0]": beta1, "betas[1]": beta2})
        check_step(step)
        has_l2 = weight_decay != 0 and not decoupled
        with denormals_kept():
            lerp_weight = to_float32(1 - beta1)
            lerp_from_grad = lerp_weight >= 0.5
            return cls(
                grad_multiplier=to_float32(-grad_scale if maximize else grad_scale),
                l2_decay=to_float32(weight_decay) if has_l2 else 0.0,
                param_decay=to_float32(1 - lr * weight_decay) if decoupled else 1.0,
                lerp_weight=lerp_weight - 1 if lerp_from_grad else lerp_weight,  # exact in fp32 from 0.5 to 1
                beta2=to_float32(beta2),
                one_minus_beta2=to_float32(1 - beta2),
                sqrt_bias_correction2=to_float32(math.sqrt(1 - beta2**step)),
                eps=to_float32(eps),
                neg_step_size=to_float32(-(lr / (1 - beta1**step))),
                lerp_from_grad=lerp_from_grad,
            )


def check_finite(**values: float) -> None:
    """Raise ValueError, naming it, for a hyper-parameter that is negative or not finite."""
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and at least 0, not {value!r}")


def check_fractions(**values: float) -> None:
    """Raise ValueError, naming it, for a hyper-parameter outside [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be at least 0 and less than 1, not {value!r}")


def check_step(step: int) -> None:
    """Raise ValueError for a step number below 1."""
    if step < 1:
        raise ValueError(f"step counts from 1, not {step!r}: bias correction divides by 1 - beta**step")
