"""The optimizer that training arguments name, offloaded."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers.training_args import OptimizerNames

import offload
from offload.optimizer import OffloadedOptimizer

# transformers' "adamw_torch", "adamw_torch_fused", "sgd" and "adagrad" are these.
_OFFLOADED: dict[type[torch.optim.Optimizer], type[OffloadedOptimizer]] = {
    torch.optim.AdamW: offload.AdamW,
    torch.optim.SGD: offload.SGD,
    torch.optim.Adagrad: offload.Adagrad,
}


def offloaded(args: transformers.TrainingArguments, **options: Any) -> tuple[type[OffloadedOptimizer], dict[str, Any]]:
    """What ``Trainer(optimizer_cls_and_kwargs=...)`` takes: the optimizer that ``args.optim`` names, offloaded.

    Learning rate, betas, epsilon and ``optim_args`` are those of ``args``, parameter groups and weight decay Trainer's.

    Args:
        args: the training arguments that Trainer is given too.
        options: of :class:`offload.optimizer.OffloadedOptimizer`: ``plan``, ``device_budget``, ``state_format``, ...

    Raises:
        ValueError: if ``args.optim`` names an optimizer that is not offered here.
    """
    cls, kwargs = transformers.Trainer.get_optimizer_cls_and_kwargs(args)
    if cls not in _OFFLOADED:
        raise ValueError(
            f"optim={OptimizerNames(args.optim).value!r} is not offered here: use adamw_torch, adamw_torch_fused, sgd "
            "or adagrad, or give Trainer the class itself: optimizer_cls_and_kwargs=(offload.Lion, {'lr': 1e-4})"
        )
    return _OFFLOADED[cls], {**kwargs, **options}


def find_optimizer(optimizer: object) -> OffloadedOptimizer:
    """The offloaded optimizer itself or the one that Accelerate wrapped.

    Raises:
        TypeError: if it is another's.
    """
    inner = optimizer
    while not isinstance(inner, OffloadedOptimizer) and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, OffloadedOptimizer):
        raise TypeError(
            f"this Trainer's optimizer is a {type(inner).__name__}, which is not offloaded; give it one by "
            f"optimizer_cls_and_kwargs=offloaded(args), or leave the callback out"
        )
    return inner
