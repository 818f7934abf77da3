"""``initialize`` in the place of ``deepspeed.initialize``, and ``install`` for code that cannot change its call."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.utils import ZeRORuntimeException

from . import seams
from .config import BLOCK, ConfigError, Settings, split_config
from .stage3 import OffloadedStage3
from .stage12 import OffloadedStage12

logger = logging.getLogger("offload")

DEFAULT_SUB_GROUP_SIZE = 10**9  # DeepSpeed's
_stock_initialize: Callable[..., Any] = deepspeed.initialize


def initialize(*args: Any, **kwargs: Any) -> Any:
    """``deepspeed.initialize``: the same arguments and results.

    With a block ``"interleaved_offload"`` in the configuration the optimizer's states are in our runtime and updated as
    its plan says; without one, DeepSpeed does what it always does.

    Returns:
        DeepSpeed's engine, optimizer, data loader and scheduler. ``engine.optimizer.offloaded.partition`` has the plan,
        the bill and ``explain()``.

    Raises:
        ConfigError: for keys that are unknown or in conflict, naming what to change.
        ZeRORuntimeException: as from DeepSpeed, for another optimizer where DeepSpeedCPUAdam is asked for.
        SeamError: if this version of DeepSpeed does not have what the plugin needs.
        BudgetError: if a budget does not hold what is asked for.
    """
    bound = inspect.signature(_stock_initialize).bind(*args, **kwargs)
    config = _find_config(bound.arguments)
    split = None if config is None else split_config(config)
    if split is None or split.settings is None:
        return _stock_initialize(*args, **kwargs)
    _check_forced(split.deepspeed, bound.arguments.get("optimizer"))
    zero = split.deepspeed["zero_optimization"]
    seams.check(seams.STAGE3_SEAMS if zero["stage"] == 3 else seams.STAGE12_SEAMS)
    with _in_the_place_of(bound.arguments, split.deepspeed), seams.zero_classes(*_classes(split.settings, zero)):
        return _stock_initialize(*bound.args, **bound.kwargs)


def _find_config(arguments: Mapping[str, Any]) -> Any:
    """The configuration, where ``deepspeed.initialize`` looks for it; None if it is nowhere."""
    for name in ("config", "config_params"):
        if arguments.get(name) is not None:
            return arguments[name]
    return getattr(arguments.get("args"), "deepspeed_config", None)


def _check_forced(config: Mapping[str, Any], optimizer: object) -> None:
    """Left out, the key asks for nothing here, where no optimizer is slower than another."""
    forced = config.get("zero_force_ds_cpu_optimizer", False)
    if forced and isinstance(optimizer, torch.optim.Optimizer) and type(optimizer).__name__ != "DeepSpeedCPUAdam":
        raise ZeRORuntimeException(
            f"zero_force_ds_cpu_optimizer={forced} asks for DeepSpeedCPUAdam and the optimizer is "
            f"{type(optimizer).__name__}; leave the key out, give DeepSpeedCPUAdam, or name Adam or AdamW in the "
            f"configuration"
        )


@contextlib.contextmanager
def _in_the_place_of(arguments: dict[str, Any], config: dict[str, Any]) -> Iterator[None]:
    """Arguments with ``config`` alone; ``args``, which are the user's, have their own again afterwards."""
    arguments.pop("config_params", None)
    arguments["config"] = config
    args: Any = arguments.get("args")
    path = getattr(args, "deepspeed_config", None)
    if path is None:
        yield
        return
    args.deepspeed_config = None  # DeepSpeed refuses two
    try:
        yield
    finally:
        args.deepspeed_config = path


def _classes(settings: Settings, zero: dict[str, Any]) -> tuple[type, type]:
    """The two ZeRO optimizers with one engine's settings."""
    stage3 = type(OffloadedStage3.__name__, (OffloadedStage3,), {"settings": settings})
    sub_group_size = int(zero.get("sub_group_size", DEFAULT_SUB_GROUP_SIZE))
    members = {"settings": settings, "sub_group_size": sub_group_size}
    return stage3, type(OffloadedStage12.__name__, (OffloadedStage12,), members)


class Installed:
    """What :func:`install` did; :meth:`remove` undoes it."""

    def remove(self) -> None:
        """Give ``deepspeed.initialize`` back. Engines made meanwhile go on as they are."""
        if deepspeed.initialize is initialize:
            deepspeed.initialize = _stock_initialize


def install() -> Installed:
    """Make ``deepspeed.initialize`` :func:`initialize`, for code that calls it itself (Trainer, Accelerate).

    Calling it again changes nothing.
    """
    deepspeed.initialize = initialize
    return Installed()


__all__ = ["BLOCK", "ConfigError", "Installed", "initialize", "install"]
