"""A debug mode: who reads a parameter or gradient whose update is in flight, and whether that read waits for it.

Most reads wait by themselves (:mod:`offload.pending`), which costs time at most. A read through an alias from before
the step is not seen there. It is here: while reads are reported, every operator that the reading thread runs, and
backward passes that it starts, is compared with the memory of what is pending.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from offload.pending import all_pending, observed

_NOT_THE_READERS = (os.path.dirname(__file__) + os.sep, os.path.dirname(torch.__file__) + os.sep, "contextlib.py")

NameOf = Callable[[Tensor], tuple[str, int]]


@dataclass(frozen=True, slots=True)
class PendingRead:
    """A read of a parameter or gradient whose update was in flight.

    Attributes:
        name: of the parameter, as in the optimizer's groups; a gradient is ``"gradient of ..."``.
        subgroup: whose update it was; the number in the plan's text.
        reader: the torch function or operator that was given it.
        waited: whether the read waited for the update. If not it may have seen the old values, or half of the new.
        stack: where, outermost call first, without the frames of torch and of this package.
    """

    name: str
    subgroup: int
    reader: str
    waited: bool
    stack: traceback.StackSummary

    def __str__(self) -> str:
        what = "waited" if self.waited else "did NOT wait: call optimizer.synchronize() before it"
        where = "".join(self.stack.format())
        return (
            f"{self.name} (subgroup {self.subgroup}) was read by {self.reader} during its update, and {what}\n{where}"
        )


@contextmanager
def pending_reads(name_of: NameOf) -> Iterator[list[PendingRead]]:
    """Collect the reads of this thread and of the backward passes that it starts.

    Args:
        name_of: gives the name and the subgroup of a pending tensor; raises KeyError for those of others.
    """
    reads: list[PendingRead] = []

    def note(tensor: Tensor, reader: str, *, waited: bool) -> None:
        try:
            name, subgroup = name_of(tensor)
        except KeyError:
            return
        frames = [frame for frame in traceback.extract_stack() if not _is_ours(frame.filename)]
        reads.append(PendingRead(name, subgroup, reader, waited, traceback.StackSummary.from_list(frames)))

    with observed(lambda tensor, reader: note(tensor, reader, waited=True)), _Aliases(note):
        yield reads


class _Aliases(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Reports operators that read the memory of a pending tensor. Those that wait come here after it was settled."""

    def __init__(self, note: Callable[..., None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._note = note

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        pending = all_pending()
        if pending and not func.is_view:
            with torch._C.DisableTorchFunctionSubclass():  # asking a pending tensor where it lies is no read
                read = [_memory(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
                for tensor in pending:
                    device, begin, end = _memory(tensor)
                    if any(device == other and begin < stop and start < end for other, start, stop in read):
                        self._note(tensor, str(func), waited=False)
        return func(*args, **(kwargs or {}))


def _memory(tensor: Tensor) -> tuple[torch.device, int, int]:
    """Device, first address and the one behind the last; strides are not negative."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return tensor.device, begin, begin + ((last + 1) * tensor.itemsize if tensor.numel() else 0)


def _is_ours(filename: str) -> bool:
    return filename.startswith(_NOT_THE_READERS[:2]) or filename.endswith(_NOT_THE_READERS[2])
