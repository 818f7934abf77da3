"""The tensors of a checkpoint under the names of a transformers model, as transformers itself would load them.

What it does by renaming is done here the same way, by its own mapping. What it merges, one tensor of many experts'
weights, is left in pieces. Anything else it computes is computed by it, and is in memory then.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from offload.streaming.experts import fused_names
from offload.streaming.piecewise import PiecewiseParameter


def as_named_by(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` of a checkpoint, under the names that ``model`` has for them.

    Raises:
        ValueError: if experts are to be converted in another way than by merging them.
    """
    transformers = sys.modules.get("transformers")  # not there, and no model is one of its
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return dict(tensors)
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
    except ImportError:  # before version 5: names are those in the files
        return dict(tensors)

    mapping = get_model_conversion_mapping(model)
    renamings = [transform for transform in mapping if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in mapping if isinstance(transform, WeightConverter)]
    prefix, wanted = model.base_model_prefix, model.state_dict()
    found: dict[str, Tensor] = {}
    gathered: dict[str, dict[str, list[str]]] = {}  # name in the model -> source pattern -> names in the checkpoint
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = rename_source_key(name, [], [], prefix, wanted)
        if pattern is None:
            found[target] = tensors[name]
        else:
            gathered.setdefault(target, {}).setdefault(pattern, []).append(name)

    fused = {f"{owner}.{name}" for owner, module in model.named_modules() for name in fused_names(module)}
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    for target, names in gathered.items():
        converter = by_pattern[next(iter(names))]
        if _merges_experts(converter):
            found[target] = _in_pieces(target, [names.get(p, []) for p in converter.source_patterns], tensors)
        elif target in fused:
            raise ValueError(
                f"transformers makes {target} of {names[next(iter(names))][0]} by {converter.operations}, which would "
                f"take all experts into memory; load the model and give offload.stream a folder: disk="
            )
        else:
            found.update(_converted(converter, target, names, tensors, model))
    return found


def _merges_experts(converter: Any) -> bool:
    """Whether all it does is to stack experts, after putting what each has one below the other."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    if len(converter.target_patterns) != 1 or len(converter.operations) > 2:
        return False
    stack, *below = converter.operations
    stacks = isinstance(stack, MergeModulelist) and stack.dim == 0
    return stacks and all(isinstance(operation, Concatenate) and operation.dim == 1 for operation in below)


def _in_pieces(target: str, by_source: Sequence[Sequence[str]], tensors: Mapping[str, Tensor]) -> PiecewiseParameter:
    """A parameter of experts, from the names of their weights: a list for each kind, in the order of the experts."""
    if len({len(names) for names in by_source}) != 1:
        kinds = ", ".join(f"{len(names)} like {names[0]}" for names in by_source if names)
        raise ValueError(f"the checkpoint lacks weights of experts for {target}: it has {kinds}")
    try:
        return PiecewiseParameter([[tensors[name] for name in names] for names in zip(*by_source, strict=True)])
    except ValueError as error:
        raise ValueError(f"the checkpoint's weights for {target} do not fit together: {error}") from None


def _converted(
    converter: Any, target: str, names: Mapping[str, Sequence[str]], tensors: Mapping[str, Tensor], model: Any
) -> dict[str, Tensor]:
    """What transformers itself makes of some tensors."""
    converter = copy.deepcopy(converter)
    for pattern, sources in names.items():
        for name in sources:
            converter.add_tensor(target, name, pattern, tensors[name])
    made = converter.convert(target, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
