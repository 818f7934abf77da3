"""A model from a checkpoint on disk, streaming from there, without ever being in memory as a whole."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from offload.streaming.attach import stream
from offload.streaming.checkpoint import common_dtype, map_checkpoint
from offload.streaming.conversion import as_named_by
from offload.streaming.experts import fused_names
from offload.streaming.handle import StreamHandle
from offload.streaming.piecewise import PiecewiseParameter


def stream_from_pretrained(
    path: str | PathLike[str],
    device_budget: int | str,
    *,
    make: Callable[[], nn.Module] | None = None,
    **kwargs: Any,
) -> tuple[nn.Module, StreamHandle]:
    """Load a model whose weights stay on disk and stream from there, in evaluation mode.

    Streamed weights are mapped from the checkpoint's files and read ahead into a small pinned ring; what stays on the
    device is copied there once. So neither device nor host memory need hold the model.

    Checkpoints of transformers' models are read by transformers' own mapping of names. Experts that it would merge into
    one tensor stay as they are in the files, and are read when a token is routed to them. A model with such experts
    comes frozen.

    Args:
        path: a safetensors file, or a folder with one, or with shards and their index.
        make: builds the model; its parameters are replaced by the checkpoint's. None takes the transformers model that
            ``config.json`` in the folder names.
        kwargs: as for :func:`offload.stream`.

    Returns:
        The model and the handle.

    Raises:
        ValueError: if checkpoint and model do not have the same weights; as :func:`offload.stream`.
    """
    if "disk" in kwargs:
        raise ValueError("stream_from_pretrained streams from the checkpoint itself; leave disk out")
    tensors = map_checkpoint(path)
    with _parameters_on_meta():
        model = _from_config(Path(path), common_dtype([*tensors.values()])) if make is None else make()
    _assign(model, as_named_by(model, tensors))
    if any(fused_names(module) for module in model.modules()):
        model.requires_grad_(False)
    model.eval()
    return model, stream(model, device_budget, **kwargs)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters of modules made here have shapes and no bytes; buffers, which no checkpoint may have, are real."""

    def without_bytes(module: nn.Module, name: str, param: nn.Parameter | None) -> Any:  # noqa: ARG001
        if param is None or param.device.type == "meta":
            return None
        return nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)

    handle = register_module_parameter_registration_hook(without_bytes)
    try:
        yield
    finally:
        handle.remove()


def _from_config(folder: Path, dtype: torch.dtype) -> nn.Module:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json to make a transformers model from; give make=")
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ImportError("this needs transformers: pip install transformers, or give make=") from error
    architectures = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    if not architectures or not hasattr(transformers, architectures[0]):
        raise ValueError(
            f"{folder}/config.json names architectures {architectures}, unknown to transformers; give make="
        )
    config = transformers.AutoConfig.from_pretrained(folder)
    model: nn.Module = getattr(transformers, architectures[0])._from_config(config, dtype=dtype)
    return model


def _assign(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Let the model's parameters and buffers be those of the checkpoint."""
    try:
        unexpected = model.load_state_dict(tensors, strict=False, assign=True).unexpected_keys
    except RuntimeError as error:  # of shapes
        raise ValueError(f"checkpoint and model differ: {error}") from None
    ignored = "|".join(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    unexpected = [name for name in unexpected if not (ignored and re.search(ignored, name))]
    tie: Any = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()
    left = [
        name
        for name, param in model.named_parameters()
        if param.device.type == "meta" and not isinstance(param, PiecewiseParameter)
    ]
    if left or unexpected:
        raise ValueError(
            f"checkpoint and model differ: {len(left)} weights of the model are missing, first {left[:3]}; "
            f"{len(unexpected)} of the checkpoint are unknown, first {unexpected[:3]}"
        )
