"""The ``interleaved_offload`` block of a DeepSpeed configuration, and what DeepSpeed itself gets to see of the rest."""

from __future__ import annotations

import base64
import copy
import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from offload.arguments import parse_options
from offload.options import Options
from offload.policy import OVERLAPS, Static, Stride, parse_policy

from . import seams

logger = logging.getLogger("offload")

BLOCK = "interleaved_offload"
STATE_FORMATS = ("fp32",)
# Keys of the paper's artifact in offload_optimizer (arXiv 2410.21316), and DeepSpeed's share of the CPU.
ARTIFACT_KEYS = ("prefetch_optimizer", "part_grads_async", "prefetch_optimizer_gap")
ADAM_TYPES = ("adam", "adamw")


class ConfigError(ValueError):
    """A configuration that cannot be run, with the key, its value and what to change."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The block ``"interleaved_offload"``, key by key.

    Attributes:
        plan: "auto", "host", "device", or a plan's text.
        update_stride: one of so many subgroups visits the accelerator; takes the place of ``plan``.
        resident_fraction: the accelerator's share of the state, 0 to 1; takes the place of ``plan``; stage 3 only.
        num_slots: device buffers, each for one subgroup's state.
        overlap: "none", "backward", "next_forward", or "auto": the last on an accelerator, none on the CPU.
        device_budget, host_budget, pinned_budget: bytes or text ("4GiB"), for each rank; None and, for the device,
            "auto" are no limit.
        state_format: "fp32".
    """

    plan: str = "auto"
    update_stride: int | None = None
    resident_fraction: float | None = None
    num_slots: int = 2
    overlap: str = "auto"
    device_budget: int | str | None = "auto"
    host_budget: int | str | None = None
    pinned_budget: int | str | None = None
    state_format: str = "fp32"

    def __post_init__(self) -> None:
        if self.overlap not in OVERLAPS:
            raise ConfigError(f"{BLOCK}.overlap={self.overlap!r} is not known; give one of {', '.join(OVERLAPS)}")
        if self.state_format not in STATE_FORMATS:
            raise ConfigError(
                f"{BLOCK}.state_format={self.state_format!r} is not available; give one of {', '.join(STATE_FORMATS)}"
            )
        named = [
            f"{name}={value!r}"
            for name, value, default in (
                ("plan", self.plan, "auto"),
                ("update_stride", self.update_stride, None),
                ("resident_fraction", self.resident_fraction, None),
            )
            if value != default
        ]
        if len(named) > 1:
            raise ConfigError(f"{BLOCK} says in {len(named)} ways what is updated where: {', '.join(named)}; keep one")

    def options(self) -> Options:
        """The runtime's options.

        Raises:
            ValueError, TypeError: for a value out of range, naming it.
        """
        plan: object = parse_policy(self.plan)
        if self.update_stride is not None:
            plan = Stride(self.update_stride)
        elif self.resident_fraction is not None:
            plan = Static(self.resident_fraction)
        uses_slots = plan in ("auto", "device") or isinstance(plan, Stride)
        return parse_options(
            plan=plan,
            device_budget=None if self.device_budget == "auto" else self.device_budget,
            host_budget=self.host_budget,
            pinned_budget=self.pinned_budget,
            subgroup_numel=None,
            num_slots=self.num_slots if uses_slots else None,
            overlap=self.overlap,
        )


@dataclass(frozen=True, slots=True)
class SplitConfig:
    """A configuration in two parts.

    Attributes:
        settings: ours; None where the configuration leaves the offloading to DeepSpeed.
        deepspeed: DeepSpeed's, as it is to see it.
    """

    settings: Settings | None
    deepspeed: dict[str, Any]


def load_config(config: object) -> dict[str, Any]:
    """A configuration as a dict of its own, from all that DeepSpeed takes: a dict, a file of (H)JSON, its base64.

    Raises:
        TypeError, ValueError: for anything else.
    """
    if isinstance(config, Mapping):
        return copy.deepcopy(dict(config))
    if isinstance(config, (str, Path)):
        text = Path(config).read_text(encoding="utf-8") if os.path.exists(config) else _decoded(str(config))
        loaded = seams.parse_json(text)
        if isinstance(loaded, dict):
            return loaded
    raise TypeError(f"the DeepSpeed configuration must be a dict or the path of a JSON file, not {config!r}")


def _decoded(config: str) -> str:
    try:
        return base64.urlsafe_b64decode(config).decode()
    except ValueError as error:
        raise ConfigError(f"{config!r} is neither the path of a DeepSpeed configuration nor one in base64") from error


def split_config(config: object) -> SplitConfig:
    """Take our block out of ``config`` and leave DeepSpeed one that it trains with, its optimizer state not offloaded.

    Raises:
        ConfigError: for unknown keys and for combinations that cannot be, naming key, value and remedy.
    """
    loaded = load_config(config)
    block = loaded.pop(BLOCK, None)
    if block is None:
        return SplitConfig(None, loaded)
    zero = loaded.get("zero_optimization") or {}
    if not isinstance(zero, dict):
        raise ConfigError(f'zero_optimization={zero!r} has no stage; make it a block: {{"stage": 3, ...}}')
    _rename_deprecated(zero)
    _check_conflicts(loaded, zero)
    settings = _settings(block, zero.pop("offload_optimizer"), zero)
    _name_optimizer(loaded)
    return SplitConfig(settings, loaded)


def _rename_deprecated(zero: dict[str, Any]) -> None:
    """Old keys, as DeepSpeed reads them: it would offload by itself if they were left."""
    if zero.pop("cpu_offload", None):
        zero["offload_optimizer"] = {"device": "cpu"}
    if zero.pop("cpu_offload_param", None):
        zero["offload_param"] = {"device": "cpu"}
    zero.pop("cpu_offload_use_pin_memory", None)


def _settings(block: object, offload_optimizer: Mapping[str, Any], zero: Mapping[str, Any]) -> Settings:
    stage = zero["stage"]
    if not isinstance(block, Mapping):
        raise ConfigError(f"{BLOCK} must be a block of keys, {{}} for the defaults, not {block!r}")
    _check_known(BLOCK, block, {field.name for field in fields(Settings)})
    # DeepSpeed, which does not get to see this block, would have refused it.
    _check_known("offload_optimizer", offload_optimizer, {*seams.offload_optimizer_keys(), *ARTIFACT_KEYS})
    values = {**_translated(offload_optimizer, block), **block}
    if zero.get("zero_quantized_weights"):
        values.setdefault("overlap", "none")
        if values["overlap"] in ("auto", "next_forward"):
            raise ConfigError(
                f"{BLOCK}.overlap={values['overlap']!r} cannot be with zero_quantized_weights, which hands parameters "
                f'to an extension that does not wait for an update in flight; set overlap to "none", or leave it out'
            )
    settings = Settings(**values)
    if settings.resident_fraction and stage < 3:
        raise ConfigError(
            f"resident_fraction={settings.resident_fraction} needs ZeRO stage 3 and this is stage {stage}: there one "
            f"flat tensor holds all masters of a parameter group; leave it out, or use stage 3"
        )
    return settings


def _check_known(name: str, block: Mapping[str, Any], known: Collection[str]) -> None:
    if unknown := sorted(set(block) - set(known)):
        raise ConfigError(f"{name} does not know {', '.join(unknown)}; known are {', '.join(sorted(known))}")


def _translated(offload_optimizer: Mapping[str, Any], block: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of the paper's artifact and DeepSpeed's ``ratio`` in our words, with a note of each."""
    found: dict[str, Any] = {}
    ratio = offload_optimizer.get("ratio", 1.0)
    if not 0 <= ratio <= 1:
        raise ConfigError(f"offload_optimizer.ratio={ratio!r} is the CPU's share of the update; give 0 to 1")
    if ratio != 1.0:
        if block.get("resident_fraction") is not None:
            raise ConfigError(
                f"offload_optimizer.ratio={ratio} (the CPU's share) and {BLOCK}.resident_fraction="
                f"{block['resident_fraction']} (the accelerator's) say the same thing twice; remove ratio"
            )
        found["resident_fraction"] = 1.0 - ratio
        logger.info("offload_optimizer.ratio=%s is read as %s.resident_fraction=%s", ratio, BLOCK, 1.0 - ratio)
    if "prefetch_optimizer" in offload_optimizer or "prefetch_optimizer_gap" in offload_optimizer:
        if offload_optimizer.get("prefetch_optimizer", True):
            found["update_stride"] = offload_optimizer.get("prefetch_optimizer_gap", 2)
        else:
            found["plan"] = "host"
        (key, value), *_ = (item for item in found.items() if item[0] != "resident_fraction")
        logger.info("prefetch_optimizer and prefetch_optimizer_gap are read as %s.%s=%r", BLOCK, key, value)
    if "part_grads_async" in offload_optimizer:
        logger.info("part_grads_async is left out: gradients always come down asynchronously, in their own dtype")
    if not offload_optimizer.get("pin_memory", True):
        logger.info("offload_optimizer.pin_memory=false is left out: %s.pinned_budget bounds pinned memory", BLOCK)
    return found


def _check_conflicts(config: Mapping[str, Any], zero: Mapping[str, Any]) -> None:
    stage = zero.get("stage", 0)
    if stage not in (1, 2, 3):
        raise ConfigError(f"{BLOCK} needs ZeRO and zero_optimization.stage is {stage!r}; set it to 1, 2 or 3")
    offload_optimizer = zero.get("offload_optimizer") or {}
    device = offload_optimizer.get("device", "none")
    if device == "nvme":
        raise ConfigError(
            f'{BLOCK} keeps states in host memory and offload_optimizer.device is "nvme"; set it to "cpu", or remove '
            f"{BLOCK}"
        )
    if device != "cpu":
        raise ConfigError(f'{BLOCK} needs zero_optimization.offload_optimizer.device="cpu", not {device!r}; set it')
    param_device = (zero.get("offload_param") or {}).get("device", "none")
    for what, present in (
        ("offload_optimizer.super_offload", offload_optimizer.get("super_offload")),
        ("zero_optimization.zenflow", zero.get("zenflow")),
        (f"offload_param.device={param_device!r}", param_device != "none"),
        *(
            (f"{dtype}.{key}", (config.get(dtype) or {}).get(key))
            for dtype in ("fp16", "bf16")
            for key in (f"{dtype}_master_weights_and_grads", f"{dtype}_optimizer_states")
        ),
        ("fp16.fp16_master_weights_and_gradients", (config.get("fp16") or {}).get("fp16_master_weights_and_gradients")),
    ):
        if present:
            raise ConfigError(f"{BLOCK} and {what} both decide where states live; remove one of them")
    _check_dtypes(config)


def _check_dtypes(config: Mapping[str, Any]) -> None:
    enabled = {name for name in ("fp16", "bf16") if (config.get(name) or {}).get("enabled")}
    accumulated = (config.get("data_types") or {}).get("grad_accum_dtype")
    trained = next(iter(enabled), "fp32")
    if accumulated not in (None, trained):
        raise ConfigError(
            f"data_types.grad_accum_dtype={accumulated!r} differs from the training dtype {trained!r}: gradients come "
            f"down in the dtype of the parameters; leave grad_accum_dtype out"
        )
    autocast = config.get("torch_autocast") or {}
    if autocast.get("enabled") and "16" in str(autocast.get("dtype")) and "bf" not in str(autocast.get("dtype")):
        raise ConfigError(
            f"torch_autocast.dtype={autocast['dtype']!r} has torch's GradScaler step the optimizer, which is not "
            f"supported; use bfloat16, or the fp16 block"
        )


def _name_optimizer(config: dict[str, Any]) -> None:
    """Have DeepSpeed construct torch's optimizer: it holds groups and state, ours is the update.

    Rates and decay are those of DeepSpeedCPUAdam where the configuration leaves them out, as with ZeRO-Offload.
    """
    optimizer = config.get("optimizer")
    if optimizer is None:
        return
    name = str(optimizer.get("type", ""))
    if name.lower() not in ADAM_TYPES:
        raise ConfigError(f"{BLOCK} updates with Adam and AdamW and optimizer.type is {name!r}; use one of those")
    params = optimizer["params"] = dict(optimizer.get("params") or {})
    if not params.pop("bias_correction", True):
        raise ConfigError("optimizer.params.bias_correction=false is not supported; leave it out")
    params.pop("fp32_optimizer_states", None)
    if not params.get("torch_adam"):
        params.setdefault("weight_decay", 0.0)
    params["torch_adam"] = True
