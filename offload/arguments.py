"""Checks of an optimizer's constructor arguments, and the names that its messages give to parameters."""

from __future__ import annotations

from os import PathLike
from typing import Any, cast

import torch

from offload.hardware import HardwareProfile
from offload.monitor import MemoryMonitor
from offload.options import Options
from offload.perf_model import Rates
from offload.plan import Placement, Plan
from offload.policy import Overlap, Policy, Stride, parse_overlap, parse_policy
from offload.pool import Budgets, parse_bytes
from offload.processors import ranks_on_this_node

# torch's implementation switches, at the values that are true of this optimizer.
_ACCEPTED_SWITCHES: dict[str, tuple[bool | None, ...]] = {
    "foreach": (None, False),
    "fused": (None, True),
    "capturable": (False,),
    "differentiable": (False,),
}


def check_switches(**switches: bool | None) -> None:
    """Raise ValueError for a switch of torch's that would have to change how the update runs."""
    for name, value in switches.items():
        if value not in _ACCEPTED_SWITCHES[name]:
            raise ValueError(
                f"{name}={value} is not available: the update is one fused pass outside autograd and CUDA graphs; "
                f"leave {name} at {_ACCEPTED_SWITCHES[name][0]}"
            )


def check_rounding_seed(rounding_seed: object) -> int:
    """``rounding_seed``, or TypeError if it is no int."""
    if not isinstance(rounding_seed, int) or isinstance(rounding_seed, bool):
        raise TypeError(f"rounding_seed must be an int, not {rounding_seed!r}")
    return rounding_seed


def check_update_in_backward(on_nonfinite: str, *, pending: bool) -> None:
    """Raise unless an update may begin in backward; ``pending``: whether one did that no step ended."""
    if pending:
        raise RuntimeError("the last update that began in update_in_backward() was not ended: call step() after it")
    if on_nonfinite == "skip":
        raise ValueError(
            "update_in_backward() cannot skip a step with on_nonfinite='skip': its update begins before every gradient "
            "was seen; construct with on_nonfinite='error', or leave the context out"
        )
    if (num_ranks := num_distributed_ranks()) > 1:
        raise ValueError(
            f"update_in_backward() in a program of {num_ranks} ranks: gradients are reduced over ranks after backward "
            f"has made them; leave the context out"
        )


def check_ranks(options: Options) -> None:
    """Raise ValueError if gradients would go down before they were reduced over ranks."""
    if options.brings_gradients_early and (num_ranks := num_distributed_ranks()) > 1:
        asked = "overlap='backward'" if options.overlap == "backward" else "early_gradients=True"
        raise ValueError(
            f"{asked} in a program of {num_ranks} ranks: gradients would be copied before they are reduced over ranks, "
            f"which autograd does not see; use overlap='next_forward' without early_gradients"
        )


def num_distributed_ranks() -> int:
    """Ranks of this program's default process group; 1 without one."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def parse_options(
    *,
    plan: object,
    device_budget: int | str | None,
    host_budget: int | str | None,
    pinned_budget: int | str | None,
    subgroup_numel: int | None,
    num_slots: int | None,
    profile: object = None,
    overlap: object = "none",
    early_gradients: object = False,
    num_passing_slots: int = 0,
    memory_monitor: object = None,
) -> Options:
    """What the user asked for, checked as far as it can be without the parameters.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is accepted.
    """
    if num_slots is not None:
        if not isinstance(num_slots, int) or isinstance(num_slots, bool):
            raise TypeError(f"num_slots must be an int or None, not {num_slots!r}")
        if num_slots < 1:
            raise ValueError(f"num_slots={num_slots} is too few; give 1 or more (2 keeps both link directions busy)")
    budgets = Budgets(
        device_bytes=parse_bytes(device_budget, "device_budget"),
        host_bytes=parse_bytes(host_budget, "host_budget"),
        pinned_bytes=parse_bytes(pinned_budget, "pinned_budget"),
    )
    policy = parse_policy(plan)
    if num_slots is not None and not (policy in ("auto", "device") or isinstance(policy, Stride)):
        raise ValueError(
            f"num_slots={num_slots} has no use with plan={plan!r}: a fixed plan names its own slots, and states that "
            f"never visit the device need none; leave num_slots out"
        )
    if profile is not None and policy != "auto":
        raise ValueError(f"profile tells plan='auto' where to start, and plan is {plan!r}; leave one of them out")
    how = parse_overlap(overlap)
    check_early_gradients(early_gradients, how, policy)
    check_passing_slots(num_passing_slots, memory_monitor, how)
    if num_passing_slots:
        num_slots = _num_lasting_slots(policy, num_slots, num_passing_slots)
    return Options(
        policy,
        budgets,
        subgroup_numel,
        num_slots,
        _rates_of(profile),
        how,
        early_gradients=bool(early_gradients),
        num_passing_slots=num_passing_slots,
        memory_monitor=cast(MemoryMonitor | None, memory_monitor),
    )


def check_early_gradients(early_gradients: object, overlap: Overlap, policy: Policy) -> None:
    """Raise TypeError or ValueError unless gradients may be asked to come down in backward."""
    if not isinstance(early_gradients, bool):
        raise TypeError(f"early_gradients must be True or False, not {early_gradients!r}")
    if early_gradients and overlap == "none":
        raise ValueError(
            "early_gradients=True has no use with overlap='none', where nothing runs beside backward; give another "
            "overlap, or leave it out"
        )
    if early_gradients and policy == "device":
        raise ValueError(
            "early_gradients=True has no use with plan='device', where no gradient goes down; leave one of them out"
        )


def check_passing_slots(num_passing_slots: int, memory_monitor: object, overlap: Overlap) -> None:
    """Raise TypeError or ValueError unless there may be so many slots in memory that backward gives back."""
    if not isinstance(num_passing_slots, int) or isinstance(num_passing_slots, bool):
        raise TypeError(f"num_passing_slots must be an int, not {num_passing_slots!r}")
    if not isinstance(memory_monitor, MemoryMonitor | None):
        raise TypeError(f"memory_monitor must be a MemoryMonitor or None, not {memory_monitor!r}")
    if num_passing_slots < 0:
        raise ValueError(f"num_passing_slots={num_passing_slots} is negative; give 0 for none")
    if (num_passing_slots > 0) != (memory_monitor is not None):
        raise ValueError(
            f"num_passing_slots={num_passing_slots} and memory_monitor={memory_monitor!r} go together: the monitor, "
            f"attached to the model, tells when backward has given back the memory of a slot; give both or neither"
        )
    if num_passing_slots and overlap == "none":
        raise ValueError(
            f"num_passing_slots={num_passing_slots} have no use with overlap='none', where nothing comes up in "
            f"backward; give another overlap, or leave them out"
        )


def _num_lasting_slots(policy: Policy, num_slots: int | None, num_passing_slots: int) -> int | None:
    """The slots that last, where others do not. Raises ValueError if ``policy`` has no use for those."""
    if policy in ("auto", "device") or isinstance(policy, Stride):
        return num_slots
    if not isinstance(policy, Plan):
        raise ValueError(
            f"num_passing_slots={num_passing_slots} have no use with plan={policy!r}, where no state visits the "
            f"device; leave them out"
        )
    of_plan = policy.num_buffers(Placement.DEVICE)
    if of_plan <= num_passing_slots:
        raise ValueError(
            f"num_passing_slots={num_passing_slots} are too many for a plan that goes through {of_plan} slots: at "
            f"least one has to last; give {max(0, of_plan - 1)} or fewer"
        )
    return of_plan - num_passing_slots


def _rates_of(profile: object) -> Rates | None:
    if profile is None or isinstance(profile, Rates):
        return profile
    if isinstance(profile, (str, PathLike)):
        profile = HardwareProfile.load(profile)
    if not isinstance(profile, HardwareProfile):
        raise TypeError(f"profile must be a HardwareProfile, its name or file, Rates, or None, not {profile!r}")
    return Rates.from_profile(profile, num_ranks=ranks_on_this_node())


def param_name(group: dict[str, Any], group_index: int, index: int) -> str:
    """The name of a group's parameter, or where it is if the parameters were given without names."""
    return str(group["param_names"][index]) if "param_names" in group else f"{index} of group {group_index}"
