"""Optimizer state as a user sees it: one entry of named tensors for each parameter, in torch's schema where it fits.

In fp32 the names and meanings are torch's. The other formats keep their own tensors under names of their own, so that
code which expects torch's cannot mistake codes for values:

- ``remainder``: int16, what the bfloat16 parameter lacks of its float32 master;
- ``signed_<moment>``: a second moment whose sign belongs to the remainder;
- ``<moment>_codes``, ``<moment>_scale``: 8-bit codes and a scale for each 128 of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from offload.kernels import STATE_FORMATS, State
from offload.kernels.codec import Rows, read_state, write_state
from offload.kernels.state import row_dtypes
from offload.shards import local
from offload.tensor_file import StoredTensor


def entry_names(state_format: str, torch_names: Mapping[str, str]) -> dict[str, str]:
    """The entry's name of each field of :class:`offload.kernels.State` that a rule may have."""
    if state_format == "fp32":
        return {"master": "master", **torch_names}
    names = {"master": "remainder"}
    for field, torch_name in torch_names.items():
        if state_format == "int8" and field != "max_second":
            names[field], names[f"{field}_scale"] = f"{torch_name}_codes", f"{torch_name}_scale"
        else:
            names[field] = f"signed_{torch_name}" if field == "second" else torch_name
    return names


def entry_views(
    state: State, shape: tuple[int, ...], dtype: torch.dtype, torch_names: Mapping[str, str]
) -> dict[str, Tensor]:
    """The entry of a parameter of this shape and dtype: views of its state, in its shape where they are as large.

    A float32 parameter has no ``master`` entry: the parameter itself is that.
    """
    names = entry_names(state.format, torch_names)
    views = {names[field]: t if field.endswith("_scale") else t.view(shape) for field, t in state.items()}
    if dtype == torch.float32:
        del views["master"]
    return views


def saved_format(
    saved: Mapping[str, Any], moments: tuple[str, ...], torch_names: Mapping[str, str], expected: str
) -> str | None:
    """The format that an entry was saved in; None if it fits none of this rule's.

    A rule without moments keeps the same in several: then it is ``expected``, if that is one of them. The master may be
    missing: torch has none.
    """
    for state_format in (expected, *STATE_FORMATS):
        names = entry_names(state_format, torch_names)
        fields = [field for field in names if field.removesuffix("_scale") in moments]
        if {names[field] for field in fields} <= saved.keys() and (state_format != "fp32") == ("remainder" in saved):
            dtypes = row_dtypes(state_format)  # split16 and bf16 have the same names; torch's moments may be of any
            if state_format == "fp32" or all(saved[names[field]].dtype == dtypes[field] for field in fields):
                return state_format
    return None


def load_entry(
    state: State, param: Tensor, saved: Mapping[str, Any], moments: tuple[str, ...], torch_names: Mapping[str, str]
) -> bool:
    """Fill ``state`` from a saved entry in whichever format; False if the master was not in it.

    From the same format, every bit. From another the moments are rounded to nearest; the master comes exactly, if half
    of it is in the parameter when that is loaded first.
    """
    source = saved_format(saved, moments, torch_names, state.format)
    assert source is not None
    saved = {name: local(value) if isinstance(value, Tensor) else value for name, value in saved.items()}
    names = entry_names(source, torch_names)
    if source == state.format:
        for field, tensor in state.items():
            if field != "master" or names[field] in saved:
                tensor.copy_(
                    value_of(saved[names[field]]).reshape(-1)
                )  # may be this very memory: a state_dict shares it
        return names["master"] in saved
    tensors = {
        field: value_of(saved[name]).reshape(-1).to(state.master.device)
        for field, name in names.items()
        if field == "master" or field.removesuffix("_scale") in moments
        if name in saved
    }
    values = local(param).detach().reshape(-1).to(state.master.device)
    has_master = "master" in tensors
    if not has_master:
        tensors["master"] = values.float()
    if source == "fp32":
        rows = Rows(*(_float32(tensors.get(name)) for name in ("master", "first", "second", "max_second")))
    else:
        rows = read_state(State(source, **tensors), values.bfloat16())
    write_state(state, None, rows, None)
    return has_master


def value_of(saved: Any) -> Any:
    """A saved tensor, read now if it is still in a file."""
    return saved.read() if isinstance(saved, StoredTensor) else saved


def _float32(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.float()
