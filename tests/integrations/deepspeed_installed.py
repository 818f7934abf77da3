"""Imported by the ranks of deepspeed_own_tests.py: DeepSpeed with the plugin installed, and configurations with it."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
from pathlib import Path
from typing import Any

import deepspeed

from offload.integrations.deepspeed import ConfigError, entry, install
from offload.integrations.deepspeed.config import BLOCK, load_config, split_config


def with_block(config: dict[str, Any], which: str) -> dict[str, Any]:
    """The configuration with our block in it, if it is one of those that are meant."""
    zero = config.get("zero_optimization")
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (1, 2, 3):
        return config
    if which in ("all", "stock") and not zero.get("offload_optimizer"):
        zero["offload_optimizer"] = {"device": "cpu"}
    if which == "stock":
        return config
    if (zero.get("offload_optimizer") or {}).get("device") != "cpu" and not zero.get("cpu_offload"):
        return config
    return {**config, BLOCK: json.loads(os.environ.get("OFFLOAD_BLOCK", "{}"))}


def install_with_block(which: str) -> None:
    """Have ``deepspeed.initialize`` offload to our runtime, whatever the configuration says."""
    stock = inspect.signature(deepspeed.initialize)
    install()
    installed = deepspeed.initialize

    @functools.wraps(installed)
    def initialize(*args: Any, **kwargs: Any) -> Any:
        bound = stock.bind(*args, **kwargs)
        given = entry._find_config(bound.arguments)
        if given is None:
            return installed(*args, **kwargs)
        config = load_config(given)
        try:
            ours = with_block(load_config(given), which)
            what = "ours" if split_config(ours).settings is not None else "not meant"
        except ConfigError as error:
            ours, what = config, f"left to DeepSpeed: {error}"
        if log := os.environ.get("OFFLOAD_LOG"):
            with Path(log).open("a", encoding="utf-8") as file:
                file.write(f"{os.environ.get('PYTEST_CURRENT_TEST')}\t{what}\n")
        if what != "ours" and which != "stock":
            return installed(*args, **kwargs)
        with entry._in_the_place_of(bound.arguments, ours):
            return installed(*bound.args, **bound.kwargs)

    deepspeed.initialize = initialize


# Torch's optimizers import it when the first is constructed: for seconds, in each rank of each test.
importlib.import_module("torch._dynamo")
# DeepSpeed would compile it for minutes, to run collectives a little faster.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
if os.environ.get("OFFLOAD_FP16") == "1":
    deepspeed.accelerator.cpu_accelerator.CPU_Accelerator.is_fp16_supported = lambda _: True
if (which := os.environ.get("OFFLOAD_ZERO", "asked")) != "none":
    install_with_block(which)
