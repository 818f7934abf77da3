"""A parameter of many experts that a checkpoint keeps apart: its values stay in the files, a piece here and there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class PiecewiseParameter(nn.Parameter):
    """Shape ``(experts, ...)``, on the meta device: it has no values of its own, and takes none.

    What expert ``i`` has of it is ``pieces[i]``, concatenated along their first dimension.
    """

    pieces: Sequence[Sequence[Tensor]]

    def __new__(cls, pieces: Sequence[Sequence[Tensor]]) -> PiecewiseParameter:
        """All experts have pieces of the same shapes and dtype, or a ValueError says which have not."""
        shapes = [[(piece.shape, piece.dtype) for piece in part] for part in pieces]
        if different := [i for i, shape in enumerate(shapes) if shape != shapes[0]]:
            raise ValueError(f"experts {different} have {shapes[different[0]]}, and expert 0 has {shapes[0]}")
        part = torch.cat([torch.empty_like(piece, device="meta") for piece in pieces[0]])
        param = super().__new__(cls, part.expand(len(pieces), *part.shape).contiguous(), requires_grad=False)
        param.pieces = pieces
        return param

    def was_written(self) -> bool:
        """Whether somebody edited it in place, or loaded a state into it, which came to nothing."""
        return self._version != 0

    def assembled(self) -> Tensor:
        """Its values, in memory."""
        values = torch.empty(self.shape, dtype=self.dtype)
        for expert, pieces in enumerate(self.pieces):
            torch.cat([*pieces], out=values[expert])
        return values


def pieces_of(param: nn.Parameter, expert: int) -> Sequence[Tensor]:
    """What ``expert`` has of ``param``, wherever it is at rest: to be concatenated along the first dimension."""
    return param.pieces[expert] if isinstance(param, PiecewiseParameter) else [param.detach()[expert]]
