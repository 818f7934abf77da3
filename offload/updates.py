"""What one step does to each parameter that has a gradient: hyper-parameters and step counts become scalars."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from offload.adam import SliceUpdate, flat
from offload.kernels import AdamScalars
from offload.masters import MasterTable

GroupedParam = tuple[dict[str, Any], Tensor]


def scalars_of(group: Mapping[str, Any], *, step: int, decoupled: bool, grad_scale: float = 1.0) -> AdamScalars:
    """Scalars of a parameter group at step number ``step``. Raises ValueError for hyper-parameters out of range."""
    beta1, beta2 = group["betas"]
    return AdamScalars.at_step(
        lr=float(group["lr"]),
        betas=(float(beta1), float(beta2)),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        step=step,
        decoupled=decoupled,
        maximize=group["maximize"],
        grad_scale=grad_scale,
    )


def updates_by_subgroup(
    params: Sequence[GroupedParam],
    masters: MasterTable,
    state: Mapping[Tensor, Mapping[str, Tensor]],
    *,
    decoupled: bool,
    grad_scale: float,
) -> dict[int, list[SliceUpdate]]:
    """Updates of one step by subgroup, in the order of ``params``. Changes nothing.

    Args:
        params: parameters with a gradient, each with its group.
        state: step counts so far; a parameter without an entry is at its first step.

    Raises:
        ValueError: for hyper-parameters that a user edited to values out of range, or after the state was laid out.
    """
    updates: defaultdict[int, list[SliceUpdate]] = defaultdict(list)
    cached: dict[tuple[int, int], AdamScalars] = {}
    for group, param in params:
        home = masters[param]
        if bool(group["amsgrad"]) != home.has_max_exp_avg_sq:
            raise ValueError(
                f"amsgrad={group['amsgrad']} in a group that was constructed with amsgrad={home.has_max_exp_avg_sq}: "
                f"the state was laid out for that; construct a new optimizer to change it"
            )
        step = 1 + int(state[param]["step"]) if state.get(param) else 1
        key = (id(group), step)
        if key not in cached:
            cached[key] = scalars_of(group, step=step, decoupled=decoupled, grad_scale=grad_scale)
        assert param.grad is not None
        grad = param.grad.detach().reshape(-1)
        updates[home.subgroup].append(SliceUpdate(home.item, grad, flat(param), cached[key]))
    return dict(updates)
