"""``offload.save``: each rank writes what its optimizer holds, and the first makes a checkpoint of it."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from offload.checkpoint.contents import Description, Part, in_files, merged, part_of, without
from offload.checkpoint.folder import abandon, begin, commit, new_data_name
from offload.checkpoint.ranks import Ranks
from offload.optimizer import OffloadedOptimizer
from offload.tensor_file import FileRecord, TensorFileWriter, kind_of


def save(
    path: str | PathLike[str],
    optimizer: torch.optim.Optimizer,
    model: nn.Module | None = None,
    *,
    extra: dict[str, Any] | None = None,
    group: dist.ProcessGroup | None = None,
) -> None:
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
        group: the ranks that save together; None: all, if torch.distributed is in use.

    Raises:
        ValueError: if ``path`` is something else than a checkpoint, or the model not this optimizer's.
        TypeError: for state, hyper-parameters or ``extra`` that cannot be saved, naming it.
        OSError: if it cannot be written, as on a full disk; what was there before is untouched.
    """
    ranks, target = Ranks(group), Path(path)
    if isinstance(optimizer, OffloadedOptimizer):
        optimizer.synchronize()
    part: Part | None = None

    def describe() -> tuple[str, Description]:
        nonlocal part
        part = part_of(optimizer, model, saves_model=ranks.rank == 0)
        merged(
            [part.description], {}, "", extra or {}
        ).dump()  # refuses what JSON cannot hold, before anything is written
        return new_data_name(), part.description

    described = ranks.all(describe)
    data = described[0][0]
    descriptions: list[Description] = []
    records: dict[str, FileRecord] = {}

    def write() -> tuple[Description, dict[str, FileRecord]]:
        assert part is not None
        own = without(part, [each for _, each in described[: ranks.rank]])
        return own.description, _write(begin(target, data), own, ranks.rank)

    def finish() -> None:
        if ranks.rank == 0:
            commit(target, merged(descriptions, records, data, extra or {}))

    try:
        for description, of_rank in ranks.all(write):
            descriptions.append(description)
            records.update(of_rank)
        ranks.all(finish)
    except BaseException:
        if ranks.rank == 0:
            abandon(target, data)
        raise


def _write(folder: Path, part: Part, rank: int) -> dict[str, FileRecord]:
    """Write a rank's files. Returns their records by name."""
    records = {}
    for kind, tensors in (("optimizer", part.optimizer_tensors), ("model", part.model_tensors)):
        for number, kinds in enumerate(in_files((name, kind_of(tensor)) for name, tensor in tensors.items())):
            name = f"rank{rank}-{kind}-{number}.safetensors"
            writer = TensorFileWriter(folder / name, kinds)
            try:
                for key in kinds:
                    writer.write(key, tensors[key])
                records[name] = writer.finish()
            finally:
                writer.close()
    return records
