"""The kernel's C ABI refuses what it was not built for, before it touches memory. make sanitize has all cases."""

from __future__ import annotations

import ctypes

import pytest
import torch

from offload.kernels import AdamScalars, native

SCALARS = AdamScalars.at_step(lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, step=1, decoupled=True)

NUMEL = 64
UNKNOWN, MISSING, MISALIGNED, LENGTH = -1, -2, -3, -4


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({}, 0),
        ({"isa": 9}, UNKNOWN),
        ({"rule": 4}, UNKNOWN),
        ({"state_format": -1}, UNKNOWN),
        ({"grad_format": 3}, UNKNOWN),
        ({"state_format": 1}, UNKNOWN),  # a compact state beside a float32 parameter
        ({"master": None}, MISSING),
        ({"second": None}, MISSING),
        ({"grad": None}, MISSING),
        ({"scalars": None}, MISSING),
        ({"master": 1}, MISALIGNED),
        ({"grad": 2}, MISALIGNED),
        ({"numel": 2**63}, LENGTH),
        ({"num_threads": 0}, LENGTH),
        ({"chunk_numel": 0}, LENGTH),
    ],
    ids=str,
)
def test_what_is_refused(change: dict[str, int | None], status: int) -> None:
    kernel = native.load()
    if kernel is None:
        pytest.skip("needs the compiled kernel")
    tensors = {name: torch.ones(NUMEL + 1) for name in ("master", "first", "second", "grad", "param")}
    before = {name: tensor.clone() for name, tensor in tensors.items()}

    def address(name: str) -> int | None:
        offset = change.get(name, 0)
        return None if offset is None else tensors[name].data_ptr() + offset

    work = native._Work(
        isa=change.get("isa", 0),
        rule=change.get("rule", 0),
        state_format=change.get("state_format", 0),
        grad_format=change.get("grad_format", 0),
        param_format=0,
        numel=change.get("numel", NUMEL),
        chunk_numel=change.get("chunk_numel", 128),
        **{name: address(name) for name in tensors},
    )
    scalars = None if "scalars" in change else SCALARS.packed
    returned = kernel._update(ctypes.byref(work), scalars, 0, 0, change.get("num_threads", 1))
    assert returned == status
    unchanged = all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())
    assert unchanged == (status != 0)
