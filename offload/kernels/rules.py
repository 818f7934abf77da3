"""Lion, Adagrad and SGD: their scalars. Adam's are in scalars.py; the arithmetic of all is in docs/numerics.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from offload.kernels.arithmetic import denormals_kept
from offload.kernels.scalars import AdamScalars, Scalars, check_finite, check_fractions, check_step, to_float32


@dataclass(frozen=True, slots=True, eq=False)
class LionScalars(Scalars):
    """Scalars of one step of Lion (Chen et al., arXiv 2302.06675), whose weight decay is decoupled."""

    rule: ClassVar[str] = "lion"

    grad_multiplier: float
    """Multiplied into the gradient: unscaling and clipping, negated to maximize."""
    param_decay: float
    """``1 - lr * weight_decay``, multiplied into the parameter."""
    one_minus_beta1: float
    one_minus_beta2: float
    neg_lr: float

    @classmethod
    def at_step(
        cls,
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        maximize: bool = False,
        grad_scale: float = 1.0,
    ) -> LionScalars:
        """Scalars of any step. Raises ValueError for hyper-parameters out of range."""
        check_finite(lr=lr, weight_decay=weight_decay)
        check_fractions(**{"betas[0]": betas[0], "betas[1]": betas[1]})
        with denormals_kept():
            return cls(
                grad_multiplier=to_float32(-grad_scale if maximize else grad_scale),
                param_decay=to_float32(1 - lr * weight_decay),
                one_minus_beta1=to_float32(1 - betas[0]),
                one_minus_beta2=to_float32(1 - betas[1]),
                neg_lr=to_float32(-lr),
            )


@dataclass(frozen=True, slots=True, eq=False)
class AdagradScalars(Scalars):
    """Scalars of one step of Adagrad as torch.optim.Adagrad defines it: weight decay is L2."""

    rule: ClassVar[str] = "adagrad"

    grad_multiplier: float
    """Multiplied into the gradient: unscaling and clipping, negated to maximize."""
    l2_decay: float
    """The gradient gets ``+ l2_decay * p``."""
    eps: float
    neg_step_size: float
    """``-(lr / (1 + (step - 1) * lr_decay))``."""

    @classmethod
    def at_step(
        cls,
        *,
        lr: float,
        lr_decay: float,
        eps: float,
        weight_decay: float,
        step: int,
        maximize: bool = False,
        grad_scale: float = 1.0,
    ) -> AdagradScalars:
        """Scalars of step number ``step`` (the first is 1). Raises ValueError for hyper-parameters out of range."""
        check_finite(lr=lr, lr_decay=lr_decay, eps=eps, weight_decay=weight_decay)
        check_step(step)
        with denormals_kept():
            return cls(
                grad_multiplier=to_float32(-grad_scale if maximize else grad_scale),
                l2_decay=to_float32(weight_decay),
                eps=to_float32(eps),
                neg_step_size=to_float32(-(lr / (1 + (step - 1) * lr_decay))),
            )


@dataclass(frozen=True, slots=True, eq=False)
class SGDScalars(Scalars):
    """Scalars of one step of SGD as torch.optim.SGD defines it: weight decay is L2, momentum 0 keeps no state."""

    rule: ClassVar[str] = "sgd"

    grad_multiplier: float
    """Multiplied into the gradient: unscaling and clipping, negated to maximize."""
    l2_decay: float
    """The gradient gets ``+ l2_decay * p``."""
    momentum: float
    one_minus_dampening: float
    neg_lr: float
    is_first: bool
    """The momentum becomes the gradient, undamped."""
    nesterov: bool

    @classmethod
    def at_step(
        cls,
        *,
        lr: float,
        momentum: float,
        dampening: float,
        weight_decay: float,
        nesterov: bool,
        step: int,
        maximize: bool = False,
        grad_scale: float = 1.0,
    ) -> SGDScalars:
        """Scalars of step number ``step`` (the first is 1). Raises ValueError for hyper-parameters out of range."""
        check_finite(lr=lr, momentum=momentum, weight_decay=weight_decay)
        check_step(step)
        if nesterov and (momentum == 0 or dampening != 0):
            raise ValueError(
                f"nesterov needs momentum > 0 and dampening 0, not momentum={momentum} and dampening={dampening}"
            )
        with denormals_kept():
            return cls(
                grad_multiplier=to_float32(-grad_scale if maximize else grad_scale),
                l2_decay=to_float32(weight_decay),
                momentum=to_float32(momentum),
                one_minus_dampening=to_float32(1 - dampening),
                neg_lr=to_float32(-lr),
                is_first=step == 1,
                nesterov=nesterov,
            )


RULES: dict[str, type[Scalars]] = {
    scalars.rule: scalars for scalars in (AdamScalars, LionScalars, AdagradScalars, SGDScalars)
}
