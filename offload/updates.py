"""What one step does to each parameter that has a gradient: hyper-parameters and step counts become scalars."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from offload.adam import SliceUpdate, flat
from offload.kernels import Rounding, Scalars
from offload.masters import NO_SUBGROUP, MasterTable, ParamHome
from offload.rules import Rule
from offload.shards import local

GroupedParam = tuple[dict[str, Any], Tensor]


def updates_by_subgroup(
    params: Sequence[GroupedParam],
    masters: MasterTable,
    state: Mapping[Tensor, Mapping[str, Tensor]],
    *,
    rule: Rule,
    grad_scale: float,
    rounding_seed: int = 0,
) -> dict[int, list[SliceUpdate]]:
    """Updates of one step by subgroup, in the order of ``params``. Changes nothing.

    Args:
        params: parameters with a gradient, each with its group.
        state: step counts so far; a parameter without an entry is at its first step.

    Raises:
        ValueError: for hyper-parameters that a user edited to values out of range, or after the state was laid out.
    """
    updates: defaultdict[int, list[SliceUpdate]] = defaultdict(list)
    cached: dict[tuple[int, int], Scalars] = {}
    for group, param in params:
        home = masters[param]
        if home.subgroup == NO_SUBGROUP:
            continue
        if rule.moments(group) != home.moments:
            raise ValueError(_changed_moments(group, home))
        step = 1 + int(state[param]["step"]) if state.get(param) else 1
        key = (id(group), step)
        if key not in cached:
            cached[key] = rule.scalars(group, step=step, grad_scale=grad_scale)
        assert param.grad is not None
        grad, rounding = local(param.grad).detach().reshape(-1), Rounding.at_step(rounding_seed, step, home.item.number)
        updates[home.subgroup].append(SliceUpdate(home.item, grad, flat(param), cached[key], rounding))
    return dict(updates)


def _changed_moments(group: Mapping[str, Any], home: ParamHome) -> str:
    if "amsgrad" in group:
        name, value, before = "amsgrad", group["amsgrad"], str("max_second" in home.moments)
    else:
        name, value, before = "momentum", group["momentum"], "0" if not home.moments else "more than 0"
    return (
        f"{name}={value} in a group that was constructed with {name}={before}: the state was laid out for that; "
        f"construct a new optimizer to change it"
    )
