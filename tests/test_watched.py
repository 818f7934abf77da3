"""Gradients whose unscaling counts as a change, and that are ordinary otherwise."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from offload.watched import WatchedTensor, unwatch, watch


@pytest.fixture
def gradient() -> Iterator[Tensor]:
    tensor = torch.full((4,), 2.0)
    watch(tensor)
    assert type(tensor) is WatchedTensor
    yield tensor
    unwatch(tensor)
    assert type(tensor) is Tensor


def test_unscaling_is_counted(gradient: Tensor) -> None:
    version = gradient._version
    torch._amp_foreach_non_finite_check_and_unscale_([gradient], torch.zeros(()), torch.tensor(0.5))
    assert gradient._version > version
    assert gradient.tolist() == [1.0] * 4
    version = gradient._version
    assert type(gradient * 2) is Tensor
    assert gradient._version == version
    gradient.mul_(2)
    assert gradient._version == version + 1


def test_torch_counts_no_unscaling() -> None:
    """If this fails, torch counts it now, and offload/watched.py has no use any more."""
    plain = torch.ones(4)
    torch._amp_foreach_non_finite_check_and_unscale_([plain], torch.zeros(()), torch.tensor(0.5))
    assert plain._version == 0


def test_copies_are_ordinary_tensors(gradient: Tensor) -> None:
    file = io.BytesIO()
    torch.save(gradient, file)
    file.seek(0)
    for copied in (copy.deepcopy(gradient), gradient.clone(), gradient.detach(), torch.load(file, weights_only=True)):
        assert type(copied) is Tensor
        assert copied.tolist() == [2.0] * 4


def test_autograd_adds_to_it() -> None:
    param = nn.Parameter(torch.ones(3))
    (2 * param).sum().backward()
    assert param.grad is not None
    watch(param.grad)
    (3 * param).sum().backward()
    assert param.grad.tolist() == [5.0] * 3
    assert type(param.grad) is WatchedTensor


def test_only_plain_tensors_are_watched() -> None:
    param = nn.Parameter(torch.ones(3))
    watch(param)
    assert type(param) is nn.Parameter
