"""Gradients before the update: whether they are finite, and the factor that clipping puts on them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from offload.shards import is_sharded, local


class NonFiniteGradientError(RuntimeError):
    """A gradient holds NaN or infinity. Parameters and optimizer state are as they were before the step."""


def all_finite(grads: Sequence[Tensor]) -> bool:
    """Whether no gradient holds NaN or infinity on this rank: one pass on the device, one wait of the host."""
    shards = [shard for shard in map(local, grads) if shard.numel()]
    return bool(torch.isfinite(torch.nn.utils.get_total_norm(shards, float("inf"))))


def total_norm(
    grads: Sequence[Tensor], norm_type: float, error_if_nonfinite: bool = False, foreach: bool | None = None
) -> Tensor:
    """:func:`torch.nn.utils.get_total_norm`, over all ranks where gradients are spread over them: the same on each.

    Gradients on several meshes, or on some and on none, have a norm each first.
    """
    by_mesh: dict[object, list[Tensor]] = {}
    for grad in grads:
        by_mesh.setdefault(getattr(grad, "device_mesh", None), []).append(grad)
    norms = [torch.nn.utils.get_total_norm(group, norm_type, False, foreach) for group in by_mesh.values()]
    norms = [norm.full_tensor() if is_sharded(norm) else norm for norm in norms]  # type: ignore[attr-defined]
    norm = norms[0] if len(norms) == 1 else torch.nn.utils.get_total_norm(norms, norm_type)
    if error_if_nonfinite and not torch.isfinite(norm):
        raise RuntimeError(
            f"the total norm of order {norm_type} of the gradients is non-finite ({float(norm)}), so it cannot be "
            f"clipped; to scale by it all the same, pass error_if_nonfinite=False"
        )
    return norm


# A gradient as it was: its memory, which goes to nobody else as long as this is held, and its version.
Fingerprint = tuple[StorageWeakRef, int]


def fingerprints_of(grads: Sequence[Tensor]) -> tuple[Fingerprint, ...]:
    """Equal for the same gradients with the same values, for all that autograd's version counter sees."""
    shards = map(local, grads)
    return tuple((StorageWeakRef(shard.untyped_storage()), shard._version) for shard in shards)  # type: ignore[no-untyped-call]


class PendingScale:
    """The factor that the next step multiplies gradients by, kept on their device until that step reads it.

    It belongs to the gradients it was computed for, as they were then: a later backward makes others, whose step it
    must not touch (a skipped step and ``model.zero_grad()`` leave it behind).
    """

    def __init__(self) -> None:
        self._scale: Tensor | None = None
        self._belongs_to: tuple[Fingerprint, ...] = ()

    def clip(
        self, grads: Sequence[Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool, foreach: bool | None
    ) -> Tensor:
        """Lower the factor so that the total norm of the scaled gradients is at most ``max_norm``.

        Returns the norm before, as :func:`torch.nn.utils.clip_grad_norm_` does, with its order of operations.
        """
        if not self._covers(grads):
            self.forget()
        norm = total_norm(grads, norm_type, error_if_nonfinite, foreach)
        if self._scale is not None:
            norm = norm * self._scale.to(norm.device)
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        self._scale = scale if self._scale is None else scale * self._scale
        # Weak, so that gradients are free to go. Addresses will not do: the allocator gives them out again.
        self._belongs_to = fingerprints_of(grads)
        return norm

    def value(self, grads: Sequence[Tensor]) -> float:
        """The factor for these gradients; 1 if it belongs to others. Waits for the device if there is one."""
        if self._scale is None:
            return 1.0
        if not self._covers(grads):
            if {storage for storage, _ in fingerprints_of(grads)} & {storage for storage, _ in self._belongs_to}:
                warnings.warn(
                    "gradients were changed after clip_grad_norm_, so its coefficient is dropped: clip last, right "
                    "before step()",
                    stacklevel=5,
                )
            return 1.0
        return float(self._scale)

    def forget(self) -> None:
        self._scale, self._belongs_to = None, ()

    def _covers(self, grads: Sequence[Tensor]) -> bool:
        return self._belongs_to == fingerprints_of(grads)
