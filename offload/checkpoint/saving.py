"""``offload.save``: each rank writes what its optimizer holds, and the first makes a checkpoint of it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from offload.checkpoint.contents import Part, in_files, merged, name_params, part_of, without
from offload.checkpoint.folder import abandon, begin, commit, new_data_name
from offload.checkpoint.index import Description
from offload.checkpoint.ranks import Ranks
from offload.checkpoint.streams import Stream, at_rest, in_motion
from offload.optimizer import OffloadedOptimizer
from offload.pool import parse_bytes
from offload.snapshot import Snapshot
from offload.tensor_file import FileRecord, Kind, TensorFileWriter, kind_of

logger = logging.getLogger("offload")


def save(
    path: str | PathLike[str],
    optimizer: torch.optim.Optimizer,
    model: nn.Module | None = None,
    *,
    extra: dict[str, Any] | None = None,
    asynchronous: bool = False,
    copy_budget: int | str | None = None,
    group: dist.ProcessGroup | None = None,
) -> Snapshot:
    """Save an optimizer's state, and the model's, to a folder: whole or not at all.

    A checkpoint that is there already is replaced when the new one is on the disk. State is written from where it lies,
    without a second copy. With several ranks, each saves the parameters of its own optimizer (the first of those that
    hold the same), and the first the model; all of them call this.

    Args:
        path: of the folder; it holds nothing else.
        optimizer: of this package or of torch.
        model: saved too, if given; its names are what parameters are matched by when loading. State formats other than
            fp32 keep half of each master in the parameters, so save the model with them.
        extra: what else is needed to go on, such as a scheduler's ``state_dict()``: anything that JSON can hold.
        asynchronous: return at once and write what is there now while training goes on, see
            [Note: copied before it is overwritten] in offload/snapshot.py. Until the result's ``wait_copied()``,
            parameters may be changed by ``step()`` only.
        copy_budget: host memory for copies of an asynchronous save, in bytes or as "4GiB"; None: two copies of the
            largest subgroup. With less than all of the state, training may wait for the disk.
        group: the ranks that save together; None: all, if torch.distributed is in use. For an asynchronous save, one of
            its own, of a backend for the CPU: ``torch.distributed.new_group(backend="gloo")``.

    Returns:
        What tells when the checkpoint is on the disk; a save that is not asynchronous is done.

    Raises:
        ValueError: if ``path`` is something else than a checkpoint, or the model not this optimizer's.
        TypeError: for state, hyper-parameters or ``extra`` that cannot be saved, naming it.
        OSError: if it cannot be written, as on a full disk; what was there before is untouched.
        offload.BudgetError: if the budgets do not hold an asynchronous save's copies.
    """
    ranks = Ranks(group)
    if isinstance(optimizer, OffloadedOptimizer):
        optimizer.finish_snapshot()
        optimizer.synchronize()
    if asynchronous and ranks.size > 1 and group is None:
        raise ValueError(
            "an asynchronous save of several ranks needs a group of its own, beside other collectives: "
            "group=torch.distributed.new_group(backend='gloo')"
        )

    def describe() -> tuple[str, Description]:
        part = part_of(optimizer, model, saves_model=ranks.rank == 0)
        merged([part.description], {}, "", extra or {}).dump()  # refuses what JSON cannot hold, before all else
        own.append(part)
        return new_data_name(), part.description

    own: list[Part] = []
    described = ranks.all(describe)
    job = _Job(ranks, Path(path), described[0][0], extra or {})
    others = [description for _, description in described[: ranks.rank]]
    begun: list[tuple[Snapshot, Part, Stream]] = []

    def begin_own() -> None:
        part = without(own[0], others)
        if asynchronous:
            begun.append(_begin_beside(job, optimizer, part, model, parse_bytes(copy_budget, "copy_budget")))
        else:
            begun.append((Snapshot(str(path)), part, at_rest(part)))

    try:
        ranks.all(begin_own)
    except BaseException as error:
        for snapshot, _, _ in begun:
            snapshot.fail(error, is_heard=True)
        raise
    ((snapshot, part, stream),) = begun
    if asynchronous:
        _run_beside(job, part, stream, snapshot)
    else:
        job.run(part, stream)
        snapshot.future.set_result(None)
    return snapshot


def _begin_beside(
    job: _Job, optimizer: torch.optim.Optimizer, part: Part, model: nn.Module | None, copy_bytes: int | None
) -> tuple[Snapshot, Part, Stream]:
    """Start to copy, and return what is to be written from the copies."""
    if not isinstance(optimizer, OffloadedOptimizer):
        raise ValueError(f"asynchronous=True needs an optimizer of this package, not {type(optimizer).__name__}")
    snapshot = optimizer.begin_snapshot(str(job.path), copy_bytes)
    assert snapshot.copier is not None
    try:
        return snapshot, *in_motion(optimizer, part, model, name_params(optimizer, model)[0], snapshot.copier)
    except BaseException as error:
        snapshot.fail(error, is_heard=True)
        raise


def _run_beside(job: _Job, part: Part, stream: Stream, snapshot: Snapshot) -> None:
    def run() -> None:
        try:
            job.run(part, stream)
        except BaseException as error:  # noqa: BLE001 - raised by the snapshot's result, or by the next step
            logger.error("the checkpoint %s was not written: %s", job.path, error)
            snapshot.fail(error)
        else:
            snapshot.future.set_result(None)

    threading.Thread(target=run, name="offload-checkpoint").start()  # the interpreter waits for it to end


@dataclass(frozen=True, slots=True)
class _Job:
    """One version of a checkpoint, written by all ranks.

    Attributes:
        data: its folder's name, the same in all ranks.
    """

    ranks: Ranks
    path: Path
    data: str
    extra: dict[str, Any]

    def run(self, part: Part, stream: Stream) -> None:
        """Write this rank's ``part``; when all ranks have, the first makes it the checkpoint."""
        descriptions: list[Description] = []
        records: dict[str, FileRecord] = {}

        def write() -> tuple[Description, dict[str, FileRecord]]:
            return part.description, _write(begin(self.path, self.data), part, stream, self.ranks.rank)

        def finish() -> None:
            if self.ranks.rank == 0:
                commit(self.path, merged(descriptions, records, self.data, self.extra))

        try:
            for description, of_rank in self.ranks.all(write):
                descriptions.append(description)
                records.update(of_rank)
            self.ranks.all(finish)
        except BaseException:
            if self.ranks.rank == 0:
                abandon(self.path, self.data)
            raise


def _write(folder: Path, part: Part, stream: Stream, rank: int) -> dict[str, FileRecord]:
    """Write a rank's files. Returns their records by name."""
    files = {
        "optimizer": _Files(folder, f"rank{rank}-optimizer", part.optimizer_tensors),
        "model": _Files(folder, f"rank{rank}-model", part.model_tensors),
    }
    try:
        for kind, key, tensor in stream:
            files[kind].write(key, tensor)
    finally:
        for each in files.values():
            each.close()
    return {name: record for each in files.values() for name, record in each.records.items()}


class _Files:
    """Writes one file after the other, each of which is on the disk when its last tensor was given."""

    def __init__(self, folder: Path, prefix: str, tensors: Mapping[str, Tensor]) -> None:
        self.records: dict[str, FileRecord] = {}
        self._folder = folder
        self._prefix = prefix
        self._cuts = [*in_files((key, kind_of(tensor)) for key, tensor in tensors.items())][::-1]
        self._left: dict[str, Kind] = {}
        self._writer: TensorFileWriter | None = None

    def write(self, key: str, tensor: Tensor) -> None:
        name = f"{self._prefix}-{len(self.records)}.safetensors"
        if self._writer is None:
            self._left = self._cuts.pop()
            self._writer = TensorFileWriter(self._folder / name, self._left)
        self._writer.write(key, tensor)
        del self._left[key]
        if not self._left:
            self.records[name] = self._writer.finish()
            self._writer = None

    def close(self) -> None:
        """Close a file that will not be finished."""
        if self._writer is not None:
            self._writer.close()
