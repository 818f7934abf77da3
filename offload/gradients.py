"""Gradients before the update: whether they are finite, and the factor that clipping puts on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class NonFiniteGradientError(RuntimeError):
    """A gradient holds NaN or infinity. Parameters and optimizer state are as they were before the step."""


def all_finite(grads: Sequence[Tensor]) -> bool:
    """Whether no gradient holds NaN or infinity: one pass on the device, one wait of the host."""
    return bool(torch.isfinite(torch.nn.utils.get_total_norm(grads, float("inf"))))


class PendingScale:
    """The factor that the next step multiplies gradients by, kept on their device until that step reads it."""

    def __init__(self) -> None:
        self._scale: Tensor | None = None

    def clip(
        self, grads: Sequence[Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool, foreach: bool | None
    ) -> Tensor:
        """Lower the factor so that the total norm of the scaled gradients is at most ``max_norm``.

        Returns the norm before, as :func:`torch.nn.utils.clip_grad_norm_` does, with its order of operations.
        """
        norm = torch.nn.utils.get_total_norm(grads, norm_type, error_if_nonfinite, foreach)
        if self._scale is not None:
            norm = norm * self._scale.to(norm.device)
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        self._scale = scale if self._scale is None else scale * self._scale
        return norm

    def take(self) -> float:
        """The factor, once: the next step has none. Waits for the device if there is one."""
        scale, self._scale = self._scale, None
        return 1.0 if scale is None else float(scale)

    def forget(self) -> None:
        self._scale = None
