"""Subgroups and the buffers they pass through: sizes, events, and the work of each operation.

A subgroup is a contiguous run of whole parameters, the unit of placement and transfer. What its operations do to
tensors is given by ``actions``; a subgroup without actions has sizes only, which is all that prediction and ordering
checks need.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from offload.lanes import Event, Work
from offload.lanes.base import nothing

FLOAT32_BYTES = 4


@dataclass(slots=True, eq=False)
class Slot:
    """A device buffer for the state of one subgroup at a time (bytes), and when it was last used.

    Attributes:
        passes: its memory comes and goes within each step, see [Note: passing slots] in :mod:`offload.executor`.
    """

    index: int
    buffer: Tensor | None = None
    passes: bool = False
    filled: Event | None = None
    updated: Event | None = None
    drained: Event | None = None

    @property
    def name(self) -> tuple[str, int]:
        return ("slot", self.index)

    @property
    def is_lost(self) -> bool:
        """Whether it was to last, and its memory was given back; see [Note: a slot less] in the executor."""
        return self.buffer is None and not self.passes


@dataclass(slots=True, eq=False)
class Staging:
    """Pinned host buffers for the gradient and the new parameters of one subgroup at a time (bytes)."""

    index: int
    grad: Tensor | None = None
    param: Tensor | None = None
    uploaded: Event | None = None
    # Updates of the CPU's kernel over these buffers, by whose they are and where: they go with the buffers.
    prepared: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def grad_name(self) -> tuple[str, int]:
        return ("staging grad", self.index)

    @property
    def param_name(self) -> tuple[str, int]:
        return ("staging param", self.index)


class Actions(Protocol):
    """What the operations do to the tensors of one subgroup; each enqueues on the lane it is submitted to."""

    def grad_down(self, staging: Staging) -> None: ...
    def update_cpu(self, staging: Staging) -> None: ...
    def upload(self, staging: Staging) -> None: ...
    def prefetch(self, slot: Slot) -> None: ...
    def update_gpu(self, slot: Slot) -> None: ...
    def flush(self, slot: Slot) -> None: ...
    def update_resident(self) -> None: ...


@dataclass(slots=True, eq=False)
class Subgroup:
    """Sizes, latest events and operations of one subgroup.

    Attributes:
        index: position in the layout; the number in a plan's text.
        numel: parameters in the subgroup.
        param_bytes: bytes of its parameters on the device.
        state_bytes: bytes of its optimizer state, in whatever format.
        master_in_param: whether half of each master is the parameter itself, so that an update on the host needs it.
        grad_bytes: bytes of its gradient; None for as many as its parameters have.
    """

    index: int
    numel: int
    param_bytes: int
    state_bytes: int
    actions: Actions | None = None
    master_in_param: bool = False
    grad_bytes: int | None = None
    grad_on_host: Event | None = None
    updated_on_host: Event | None = None
    params_ready: Event | None = None  # of the last step that wrote them
    flushed: Event | None = None

    def sizes_only(self) -> Subgroup:
        """The same sizes without tensors or events."""
        return replace(self, actions=None, grad_on_host=None, updated_on_host=None, params_ready=None, flushed=None)

    @property
    def down_bytes(self) -> int:
        """What comes down for an update on the host: gradients, and the parameters where they hold half the master."""
        grad_bytes = self.param_bytes if self.grad_bytes is None else self.grad_bytes
        return grad_bytes + (self.param_bytes if self.master_in_param else 0)

    @property
    def host_update_bytes(self) -> int:
        """Host memory read and written by an update there: state in and out, what came down in, parameters out."""
        return 2 * self.state_bytes + self.down_bytes + self.param_bytes

    # Buffers, as the ordering checks name them.
    @property
    def param_name(self) -> tuple[str, int]:
        return ("param", self.index)

    @property
    def grad_name(self) -> tuple[str, int]:
        return ("grad", self.index)

    @property
    def state_name(self) -> tuple[str, int]:
        return ("state", self.index)

    # The work of each operation.
    def grad_down(self, staging: Staging) -> Work:
        return Work(
            f"D{self.index}@{staging.index}",
            partial(self.actions.grad_down, staging) if self.actions else nothing,
            num_bytes=self.down_bytes,
            reads=(self.grad_name, self.param_name) if self.master_in_param else (self.grad_name,),
            writes=(staging.grad_name, staging.param_name) if self.master_in_param else (staging.grad_name,),
        )

    def update_cpu(self, staging: Staging) -> Work:
        return Work(
            f"C{self.index}@{staging.index}",
            partial(self.actions.update_cpu, staging) if self.actions else nothing,
            numel=self.numel,
            host_bytes=self.host_update_bytes,
            reads=(staging.grad_name,),
            writes=(self.state_name, staging.param_name),
        )

    def upload(self, staging: Staging) -> Work:
        return Work(
            f"U{self.index}@{staging.index}",
            partial(self.actions.upload, staging) if self.actions else nothing,
            num_bytes=self.param_bytes,
            reads=(staging.param_name,),
            writes=(self.param_name,),
        )

    def prefetch(self, slot: Slot) -> Work:
        return Work(
            f"P{self.index}@{slot.index}",
            partial(self.actions.prefetch, slot) if self.actions else nothing,
            num_bytes=self.state_bytes,
            reads=(self.state_name,),
            writes=(slot.name,),
        )

    def update_gpu(self, slot: Slot) -> Work:
        return Work(
            f"G{self.index}@{slot.index}",
            partial(self.actions.update_gpu, slot) if self.actions else nothing,
            numel=self.numel,
            reads=(self.grad_name,),
            writes=(slot.name, self.param_name),
        )

    def flush(self, slot: Slot) -> Work:
        return Work(
            f"F{self.index}@{slot.index}",
            partial(self.actions.flush, slot) if self.actions else nothing,
            num_bytes=self.state_bytes,
            reads=(slot.name,),
            writes=(self.state_name,),
        )

    def update_resident(self) -> Work:
        return Work(
            f"R{self.index}",
            self.actions.update_resident if self.actions else nothing,
            numel=self.numel,
            reads=(self.grad_name,),
            writes=(self.state_name, self.param_name),
        )
