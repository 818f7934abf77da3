"""Hyper-parameters and step counts of the torch or DeepSpeed Adam that holds a ZeRO optimizer's groups and state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offload.kernels import AdamScalars

from .partition import STATE_ROWS

# DeepSpeed's own optimizers, by name: importing them builds C++ extensions.
DEEPSPEED_ADAMS = ("DeepSpeedCPUAdam", "FusedAdam")


def is_decoupled(optimizer: torch.optim.Optimizer) -> bool:
    """Whether weight decay is decoupled from the gradient (AdamW).

    Raises:
        TypeError: for an optimizer that is no Adam, naming those that are supported.
    """
    if type(optimizer) is torch.optim.AdamW:
        return True
    if type(optimizer) is torch.optim.Adam:
        return bool(optimizer.defaults.get("decoupled_weight_decay"))
    if type(optimizer).__name__ in DEEPSPEED_ADAMS:
        return bool(optimizer.adam_w_mode)  # type: ignore[attr-defined]
    raise TypeError(
        f"{type(optimizer).__name__} cannot be offloaded with interleaved_offload; give torch.optim.AdamW or Adam, "
        f"DeepSpeedCPUAdam or FusedAdam, or name Adam or AdamW in the configuration"
    )


def check_group(group: Mapping[str, Any]) -> None:
    """Raise ValueError for options of Adam that the update does not have here."""
    for name in ("amsgrad", "capturable", "differentiable"):
        if group.get(name):
            raise ValueError(f"{name}=True is not supported with interleaved_offload; leave it out")
    if not group.get("bias_correction", True):
        raise ValueError("bias_correction=False is not supported with interleaved_offload; leave it out")


def scalars_at(group: Mapping[str, Any], *, step: int, decoupled: bool, grad_scale: float) -> AdamScalars:
    """Scalars of a group at step number ``step``, the first being 1."""
    beta1, beta2 = group["betas"]
    return AdamScalars.at_step(
        lr=float(group["lr"]),
        betas=(float(beta1), float(beta2)),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        step=step,
        decoupled=decoupled,
        maximize=bool(group.get("maximize", False)),
        grad_scale=grad_scale,
    )


@dataclass(frozen=True, slots=True)
class StateEntries:
    """The entries of ``optimizer.state`` as views of our states, under the names that DeepSpeed's checkpoints have.

    Attributes:
        masters: the tensors that ``optimizer.state`` is keyed by: row 0 of each state, as leaves.
    """

    optimizer: torch.optim.Optimizer  # not its state: loading gives it another dict
    masters: Sequence[Tensor]
    states: Sequence[Tensor]

    def adopt(self) -> None:
        """Take over what a checkpoint put into ``optimizer.state``, and make its entries views of our states again."""
        for master, state in zip(self.masters, self.states, strict=True):
            entry = self.optimizer.state[master]
            for name, row in zip(STATE_ROWS[1:], state[1:], strict=True):
                loaded = entry.get(name)
                if loaded is not None and loaded.data_ptr() != row.data_ptr():
                    row.copy_(loaded.view(-1))
                entry[name] = row
            entry["step"] = int(entry.get("step", 0))  # DeepSpeedCPUAdam counts in an int

    def next_step(self, index: int) -> int:
        """Count one more step of a flat tensor; its number."""
        entry = self.optimizer.state[self.masters[index]]
        entry["step"] += 1
        return int(entry["step"])


def state_entries(optimizer: torch.optim.Optimizer, states: Sequence[Tensor]) -> StateEntries:
    """Put ``states`` into an optimizer that has none yet."""
    masters = [state[0].detach().requires_grad_() for state in states]
    entries = StateEntries(optimizer, masters, states)
    entries.adopt()
    return entries
