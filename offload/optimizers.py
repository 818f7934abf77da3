"""Adam, AdamW, Lion, Adagrad and SGD over one runtime: torch's arguments, then those of :class:`OffloadedOptimizer`."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from offload.arguments import check_switches
from offload.optimizer import OffloadedOptimizer
from offload.rules import AdagradRule, AdamRule, LionRule, SGDRule

# torch's implementation switches, at the values that describe these optimizers.
_SWITCHES: dict[str, Any] = {"foreach": None, "capturable": False, "differentiable": False, "fused": None}


class Adam(OffloadedOptimizer):
    """``torch.optim.Adam``, offloaded: the bits are those of torch's fused CPU kernel.

    Args:
        lr, betas, eps, weight_decay, amsgrad, maximize: as in torch.
        foreach, fused, capturable, differentiable: accepted at the values that describe this optimizer (it is fused,
            runs eagerly and is not differentiable), so that code written for torch's runs; other values are errors.
        options: see :class:`OffloadedOptimizer`.
    """

    rule = AdamRule(decoupled=False)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Any,
    ) -> None:
        check_switches(foreach=foreach, fused=fused, capturable=capturable, differentiable=differentiable)
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad,
            "maximize": maximize, **_SWITCHES, "decoupled_weight_decay": self.rule.decoupled,
        }  # fmt: skip
        super().__init__(params, defaults, **options)


class AdamW(Adam):
    """``torch.optim.AdamW`` (weight decay decoupled from the gradient), offloaded. See :class:`Adam`."""

    rule = AdamRule(decoupled=True)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **options)


class Lion(OffloadedOptimizer):
    """Lion (Chen et al., *Symbolic Discovery of Optimization Algorithms*, arXiv 2302.06675), offloaded.

    Args:
        lr, betas, weight_decay: as in the paper; the decay is decoupled. A learning rate 3 to 10 times smaller than
            AdamW's, and a decay as much larger, is where the authors start.
        maximize: as in torch's optimizers.
        options: see :class:`OffloadedOptimizer`.
    """

    rule = LionRule()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, **options)


class Adagrad(OffloadedOptimizer):
    """``torch.optim.Adagrad``, offloaded: the bits are those of torch's fused CPU kernel.

    Args:
        lr, lr_decay, weight_decay, eps, maximize: as in torch. The sums start at zero.
        foreach, fused, differentiable: see :class:`Adam`.
        options: see :class:`OffloadedOptimizer`.
    """

    rule = AdagradRule()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        eps: float = 1e-10,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Any,
    ) -> None:
        check_switches(foreach=foreach, fused=fused, differentiable=differentiable)
        defaults = {
            "lr": lr, "lr_decay": lr_decay, "weight_decay": weight_decay, "eps": eps, "maximize": maximize,
            **_SWITCHES,
        }  # fmt: skip
        super().__init__(params, defaults, **options)


class SGD(OffloadedOptimizer):
    """``torch.optim.SGD``, offloaded: the bits are those of torch's fused CPU kernel.

    Without momentum there is no state but the float32 master (and no reason to offload it, if parameters are float32).

    Args:
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in torch.
        foreach, fused, differentiable: see :class:`Adam`.
        options: see :class:`OffloadedOptimizer`.
    """

    rule = SGDRule()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Any,
    ) -> None:
        check_switches(foreach=foreach, fused=fused, differentiable=differentiable)
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
            "nesterov": nesterov, "maximize": maximize, **_SWITCHES,
        }  # fmt: skip
        super().__init__(params, defaults, **options)
