"""Packing: whole parameters, in order, of one dtype, about as large as asked; and which parameters can be."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload.layout import (
    DEFAULT_NUM_SUBGROUPS,
    MAX_SUBGROUP_NUMEL,
    MIN_SUBGROUP_NUMEL,
    check_grad,
    check_param,
    pack,
    resolve_subgroup_numel,
)

CPU = torch.device("cpu")


def params_of(*numels: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.zeros(numel, dtype=dtype) for numel in numels]


def packed_numels(params: list[torch.Tensor], subgroup_numel: int) -> list[list[int]]:
    return [[item.numel for item in packed.slices] for packed in pack(0, params, subgroup_numel)]


# ---- packing


@pytest.mark.parametrize(
    ("numels", "expected"),
    [
        ([10, 10, 10, 10], [[10, 10], [10, 10]]),
        ([20, 20], [[20], [20]]),
        ([50, 50], [[50], [50]]),  # larger than a subgroup: parameters are never cut
        ([4, 50, 4], [[4, 50], [4]]),  # a run that is not half full takes the large one with it
        ([10, 50], [[10], [50]]),  # one that is, does not
        ([1] * 5, [[1] * 5]),
        ([0, 7, 0], [[7]]),  # nothing to update in an empty parameter
        ([0], []),
        ([], []),
    ],
)
def test_packing(numels: list[int], expected: list[list[int]]) -> None:
    assert packed_numels(params_of(*numels), 20) == expected


def test_dtypes_are_packed_apart_in_order() -> None:
    params = [*params_of(8), *params_of(4, dtype=torch.bfloat16), *params_of(6), *params_of(2, dtype=torch.bfloat16)]
    first, second = pack(3, params, 20)
    assert (first.dtype, second.dtype) == (torch.float32, torch.bfloat16)
    assert [item.param is params[i] for item, i in zip(first.slices, (0, 2), strict=True)] == [True, True]
    assert [(item.offset, item.numel) for item in first.slices] == [(0, 8), (8, 6)]
    assert [(item.offset, item.numel) for item in second.slices] == [(0, 4), (4, 2)]
    assert (first.numel, second.numel) == (14, 6)
    assert first.group_index == 3


@given(st.lists(st.tuples(st.integers(0, 50), st.booleans()), max_size=20), st.integers(1, 60))
def test_every_parameter_once_without_gaps(parameters: list[tuple[int, bool]], subgroup_numel: int) -> None:
    params = [torch.zeros(numel, dtype=torch.bfloat16 if half else torch.float32) for numel, half in parameters]
    packed = pack(0, params, subgroup_numel)
    found = [id(item.param) for subgroup in packed for item in subgroup.slices]
    assert sorted(found) == sorted(id(param) for param in params if param.numel())
    for subgroup in packed:
        ends = [0, *(item.offset + item.numel for item in subgroup.slices)]
        assert [item.offset for item in subgroup.slices] == ends[:-1]
        assert subgroup.numel == ends[-1] > 0
        assert all(item.param.dtype == subgroup.dtype and item.param.numel() == item.numel for item in subgroup.slices)
        *others, last = (item.numel for item in subgroup.slices)
        assert sum(others) + last <= subgroup_numel or 2 * sum(others) < subgroup_numel


# ---- subgroup size


def test_default_subgroup_size() -> None:
    assert resolve_subgroup_numel(None, 10) == MIN_SUBGROUP_NUMEL
    assert resolve_subgroup_numel(None, DEFAULT_NUM_SUBGROUPS * 2 * MIN_SUBGROUP_NUMEL) == 2 * MIN_SUBGROUP_NUMEL
    assert resolve_subgroup_numel(None, 10**12) == MAX_SUBGROUP_NUMEL


def test_subgroup_size_of_the_user() -> None:
    assert resolve_subgroup_numel(1, 100) == 1
    assert resolve_subgroup_numel(100, 100) == 100
    assert resolve_subgroup_numel(1, 0) == 1  # a model with nothing to train


@pytest.mark.parametrize("subgroup_numel", [0, -5, 101])
def test_subgroup_size_out_of_range(subgroup_numel: int) -> None:
    with pytest.raises(ValueError) as raised:
        resolve_subgroup_numel(subgroup_numel, 100)
    assert str(raised.value) == (
        f"subgroup_numel={subgroup_numel} is out of range: the model has 100 trainable parameters, "
        "so give 1 to 100, or None to let the runtime choose"
    )


@pytest.mark.parametrize("subgroup_numel", [1.5, "100", True])
def test_subgroup_size_of_another_type(subgroup_numel: object) -> None:
    with pytest.raises(TypeError, match=f"subgroup_numel must be an int or None, not {subgroup_numel!r}"):
        resolve_subgroup_numel(subgroup_numel, 100)  # type: ignore[arg-type]


# ---- parameters and gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parameter_and_gradient_that_can_be(dtype: torch.dtype) -> None:
    param = torch.zeros(3, 4, dtype=dtype)
    check_param(param, "weight", CPU)
    check_grad(torch.zeros(4, 3, dtype=dtype).t(), param, "weight")  # a gradient need not be contiguous


@pytest.mark.parametrize(
    ("param", "reason"),
    [
        (torch.zeros(2, device="meta"), "is on meta but this optimizer's device is cpu; move the model to one device"),
        (torch.zeros(2, dtype=torch.float64), "has dtype torch.float64; supported are torch.float32, torch.bfloat16"),
        (torch.zeros(2, dtype=torch.complex64), "has dtype torch.complex64; supported are"),
        (torch.zeros(2, dtype=torch.int32), "has dtype torch.int32; supported are"),
        (torch.zeros(3, 4).t(), "of shape (4, 3) is not contiguous (strides (1, 4)); make it so first: param.data ="),
        (torch.zeros(3, 4)[:, :2], "of shape (3, 2) is not contiguous (strides (4, 1))"),
        (torch.zeros(3, 4).to_sparse(), "of shape (3, 4) is not contiguous"),
    ],
)
def test_parameter_that_cannot_be(param: torch.Tensor, reason: str) -> None:
    with pytest.raises(ValueError, match=f"parameter group.weight {re.escape(reason)}"):
        check_param(param, "group.weight", CPU)


def test_gradient_that_cannot_be() -> None:
    param = torch.zeros(3, 4, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"gradient of parameter w is sparse .*torch\.optim\.SparseAdam"):
        check_grad(torch.zeros(3, 4, dtype=torch.bfloat16).to_sparse(), param, "w")
    with pytest.raises(RuntimeError, match=r"gradient of parameter w has dtype torch\.float32, .*cast the gradient"):
        check_grad(torch.zeros(3, 4), param, "w")
