"""``offload.load``: everything is checked, on every rank, before anything is changed on any."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from offload.checkpoint.index import CheckpointError
from offload.checkpoint.ranks import Ranks
from offload.checkpoint.reading import (
    Stored,
    check_for_torch,
    fill_model,
    match_model,
    match_params,
    state_dict_for,
    torch_state_dict,
    verify,
)
from offload.optimizer import OffloadedOptimizer
from offload.tensor_file import StoredTensor


class _Match:
    """A checkpoint that fits this optimizer and model, every byte of which was checked."""

    def __init__(self, path: Path, optimizer: torch.optim.Optimizer, model: nn.Module | None) -> None:
        self._optimizer = optimizer
        self._model = model
        self._stored = Stored(path)
        self.names: dict[Tensor, str] = {}
        self._of_model: dict[str, StoredTensor] = {}
        try:
            self.names = match_params(self._stored.index, optimizer, model)
            self._state_dict = state_dict_for(optimizer, self._stored, self.names)
            if isinstance(optimizer, OffloadedOptimizer):
                optimizer.check_state_dict(self._state_dict)
            else:
                check_for_torch(optimizer, self._state_dict)
            if model is not None:
                self._of_model = match_model(self._stored, model)
        except ValueError as error:
            raise CheckpointError(f"{path} does not fit: {error}") from error
        of_optimizer = [tensor for entry in self._state_dict["state"].values() for tensor in entry.values()]
        verify([*of_optimizer, *self._of_model.values()])

    @property
    def extra(self) -> dict[str, Any]:
        return self._stored.index.extra

    def strangers(self, names: set[str]) -> list[str]:
        """Saved parameters that are not among ``names``."""
        return sorted(self._stored.index.params.keys() - names) if self._stored.index.named else []

    def load(self) -> None:
        """The model first: half of a compact format's masters are its parameters."""
        try:
            if self._model is not None:
                fill_model(self._model, self._of_model)
            state_dict = self._state_dict
            if not isinstance(self._optimizer, OffloadedOptimizer):
                state_dict = torch_state_dict(self._optimizer, self._stored, state_dict)
            self._optimizer.load_state_dict(state_dict)
        except Exception as error:
            raise RuntimeError(
                f"loading {self._stored.path} failed half way, after all of it had been checked: {error}; model and "
                f"optimizer hold parts of it, so load a checkpoint again before going on"
            ) from error


def load(
    path: str | PathLike[str],
    optimizer: torch.optim.Optimizer,
    model: nn.Module | None = None,
    *,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Load what :func:`offload.save` wrote, into any placement, budgets, state format, overlap and number of ranks.

    Parameters are matched by their names in ``model``, or in the optimizer if it was constructed with named parameters;
    by position where saver or loader had no names. The optimizer may be torch's.

    Everything is read and checked before anything is changed, and with several ranks, each of which takes what its own
    optimizer holds, by all of them. Nothing in a checkpoint is executed.

    Args:
        path: the folder.
        model: gets the saved weights, if given.
        group: the ranks that load together; None: all, if torch.distributed is in use.

    Returns:
        ``extra`` as it was saved.

    Raises:
        offload.CheckpointError: if there is no whole checkpoint, a byte of it is not what was written, or it does not
            fit; nothing was loaded. It names the file and the tensor.
        RuntimeError: if another rank refused; or if reading failed when everything had been checked.
    """
    ranks = Ranks(group)
    if isinstance(optimizer, OffloadedOptimizer):
        optimizer.finish_snapshot()
        optimizer.synchronize()
    match: _Match | None = None

    def check() -> list[str]:
        nonlocal match
        match = _Match(Path(path), optimizer, model)
        return [*match.names.values()]

    names = {name for of_rank in ranks.all(check) for name in of_rank}
    assert match is not None
    if strangers := match.strangers(names):
        raise CheckpointError(
            f"{path} has {len(strangers)} parameters that no optimizer here holds, first {strangers[0]!r}: it is "
            f"another model's"
        )
    ranks.all(match.load)
    return match.extra
