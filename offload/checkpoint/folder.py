"""A checkpoint's folder on disk: replaced as a whole or not at all, and read without leaving it.

    path/index.json              what :mod:`offload.checkpoint.index` describes
    path/data-<16 hex digits>/   the files of one version

A new version is written to a folder of another name, with a dot before it. When all of it is on the disk it gets its
name, and the index, which is what makes it the checkpoint, is renamed over the old one: POSIX promises that a reader,
or the next start after a kill or a power failure, sees either. What the old index named is removed then.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from pathlib import Path

from offload.checkpoint.index import DATA_NAME, INDEX_NAME, CheckpointError, Index
from offload.tensor_file import open_inside

_PART = f".{INDEX_NAME}.part"
_MAX_INDEX_BYTES = 1 << 30


def new_data_name() -> str:
    """A folder's name that no version has."""
    return f"data-{secrets.token_hex(8)}"


def begin(path: Path, data: str) -> Path:
    """The folder that the files of version ``data`` are written to until it is committed.

    Raises:
        ValueError: if ``path`` is something else than a checkpoint.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; a checkpoint is a folder: give the name of a new one")
    foreign = [name for name in _names_in(path) if not _is_ours(name)]
    if foreign:
        raise ValueError(f"{path} holds {foreign[0]!r}, which is of no checkpoint: give the name of a new folder")
    path.mkdir(parents=True, exist_ok=True)
    folder = path / f".{data}"
    folder.mkdir(exist_ok=True)
    return folder


def commit(path: Path, index: Index) -> None:
    """Make the version that ``index`` describes the checkpoint. Its files are on the disk."""
    folder = path / f".{index.data}"
    _sync_folder(folder)
    os.rename(folder, path / index.data)
    part = path / _PART
    with part.open("wb") as file:
        file.write(index.dump().encode())
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(path)  # the version has its name before the index says so
    os.replace(part, path / INDEX_NAME)
    _sync_folder(path)
    _sync_folder(path.parent)
    _remove_others(path, keep=index.data)


def abandon(path: Path, data: str) -> None:
    """Remove what was written of version ``data``, unless it is the checkpoint already."""
    with contextlib.suppress(CheckpointError):
        if read_index(path)[0].data == data:
            return
    shutil.rmtree(path / f".{data}", ignore_errors=True)
    shutil.rmtree(path / data, ignore_errors=True)
    with contextlib.suppress(OSError):
        (path / _PART).unlink(missing_ok=True)


def _remove_others(path: Path, keep: str) -> None:
    """Remove older versions, and what an interrupted save left."""
    for name in _names_in(path):
        if name not in (INDEX_NAME, keep) and _is_ours(name):
            shutil.rmtree(path / name, ignore_errors=True)


def _names_in(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []


def _is_ours(name: str) -> bool:
    return name in (INDEX_NAME, _PART) or DATA_NAME.fullmatch(name.removeprefix(".")) is not None


def _sync_folder(path: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_index(path: Path) -> tuple[Index, Path]:
    """The index of the checkpoint at ``path``, and the folder with its files.

    Raises:
        CheckpointError: if there is none that is whole.
    """
    if not path.is_dir():
        there = "a file" if path.exists() else "nothing"
        raise CheckpointError(f"{path} is no checkpoint of offload.save: {there} is there")
    if INDEX_NAME not in _names_in(path):
        raise CheckpointError(
            f"{path} has no {INDEX_NAME}: it is no checkpoint of offload.save, or the first save to it was interrupted"
        )
    try:
        with open_inside(path, INDEX_NAME) as file:
            if os.fstat(file.fileno()).st_size > _MAX_INDEX_BYTES:
                raise CheckpointError(f"it is larger than {_MAX_INDEX_BYTES} bytes")
            index = Index.parse(file.read())
    except ValueError as error:
        raise CheckpointError(f"{path / INDEX_NAME} cannot be used: {error}") from error
    folder = path / index.data
    if folder.is_symlink() or not folder.is_dir():
        raise CheckpointError(f"{folder}, which the index names, is no folder of the checkpoint")
    return index, folder
