"""Arguments that several commands share, and what they mean."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offload.estimate import ModelCost, parse_shape, transformer_cost
from offload.tracing import trace_module


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write a Perfetto trace of the predicted step")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the predicted timeline (png, svg, pdf)")


def add_hardware(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hardware", required=True, metavar="NAME_OR_FILE", help="a shipped profile, or a file")


def model_cost(model: str, *, micro_batch: int, seq: int, recompute: bool) -> ModelCost:
    """What ``model`` takes: a transformer's shape, or ``package.module:function`` that makes a module.

    The function takes no arguments; what it returns is called with token ids of shape (micro_batch, seq). It may
    instead return the module and the tuple of its arguments.

    Raises:
        ValueError: if there is no such shape or function, or the module cannot be traced.
    """
    if ":" not in model:
        shape = parse_shape(model)
        return transformer_cost(model, shape, micro_batch=micro_batch, seq=seq, recompute=recompute)
    if not recompute:
        raise ValueError("--no-recompute is for shapes; a module recomputes where its own code says so")
    made: list[tuple[Tensor, ...]] = []

    def build() -> nn.Module:
        result = _find(model)()
        if isinstance(result, tuple):
            result, arguments = result
            made.append(arguments)
        if not isinstance(result, nn.Module):
            raise ValueError(f"{model} returned a {type(result).__name__}; return a module, or a module and arguments")
        return result

    def inputs() -> tuple[Tensor, ...]:
        if made:
            return tuple(torch.empty(t.shape, dtype=t.dtype, requires_grad=t.requires_grad) for t in made[0])
        return (torch.zeros(micro_batch, seq, dtype=torch.long),)

    return trace_module(build, inputs, name=model)


def _find(model: str) -> Callable[[], Any]:
    module_name, _, function_name = model.partition(":")
    if "" not in sys.path:  # a console script does not see the current folder
        sys.path.insert(0, "")
    try:
        found: Callable[[], Any] = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"no function {model!r}: {error}; give package.module:function") from error
    return found
