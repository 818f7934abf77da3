"""The optimizers as the runtime knows them: what each keeps, what torch calls it, and the scalars of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from offload.kernels import AdagradScalars, AdamScalars, LionScalars, Scalars, SGDScalars


class Rule(Protocol):
    """An update rule. ``group`` is a parameter group, as the user may have edited it."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def torch_names(self) -> Mapping[str, str]:
        """What torch's schema calls the fields of :class:`offload.kernels.State`."""

    def moments(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Fields of :class:`offload.kernels.State` that the group's hyper-parameters ask for."""

    def scalars(self, group: Mapping[str, Any], *, step: int, grad_scale: float = 1.0) -> Scalars:
        """Scalars of step number ``step`` (from 1). Raises ValueError for hyper-parameters out of range."""


@dataclass(frozen=True, slots=True)
class AdamRule:
    decoupled: bool
    name: str = "Adam"

    @property
    def torch_names(self) -> Mapping[str, str]:
        return {"first": "exp_avg", "second": "exp_avg_sq", "max_second": "max_exp_avg_sq"}

    def moments(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        return ("first", "second", "max_second") if group["amsgrad"] else ("first", "second")

    def scalars(self, group: Mapping[str, Any], *, step: int, grad_scale: float = 1.0) -> AdamScalars:
        beta1, beta2 = group["betas"]
        return AdamScalars.at_step(
            lr=float(group["lr"]),
            betas=(float(beta1), float(beta2)),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=step,
            decoupled=self.decoupled,
            maximize=group["maximize"],
            grad_scale=grad_scale,
        )


@dataclass(frozen=True, slots=True)
class LionRule:
    name: str = "Lion"

    @property
    def torch_names(self) -> Mapping[str, str]:
        return {"first": "exp_avg"}

    def moments(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        return ("first",)

    def scalars(self, group: Mapping[str, Any], *, step: int, grad_scale: float = 1.0) -> LionScalars:
        beta1, beta2 = group["betas"]
        return LionScalars.at_step(
            lr=float(group["lr"]),
            betas=(float(beta1), float(beta2)),
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            grad_scale=grad_scale,
        )


@dataclass(frozen=True, slots=True)
class AdagradRule:
    name: str = "Adagrad"

    @property
    def torch_names(self) -> Mapping[str, str]:
        return {"second": "sum"}

    def moments(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        return ("second",)

    def scalars(self, group: Mapping[str, Any], *, step: int, grad_scale: float = 1.0) -> AdagradScalars:
        return AdagradScalars.at_step(
            lr=float(group["lr"]),
            lr_decay=group["lr_decay"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=step,
            maximize=group["maximize"],
            grad_scale=grad_scale,
        )


@dataclass(frozen=True, slots=True)
class SGDRule:
    name: str = "SGD"

    @property
    def torch_names(self) -> Mapping[str, str]:
        return {"first": "momentum_buffer"}

    def moments(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        return ("first",) if group["momentum"] else ()

    def scalars(self, group: Mapping[str, Any], *, step: int, grad_scale: float = 1.0) -> SGDScalars:
        return SGDScalars.at_step(
            lr=float(group["lr"]),
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            step=step,
            maximize=group["maximize"],
            grad_scale=grad_scale,
        )
