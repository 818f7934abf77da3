"""Weights in safetensors files, memory-mapped: read when a layer is, and never held twice.

Mapped here because a mapping of our own stays mapped for as long as the model streams, whatever a library's loader
copies.
"""

from __future__ import annotations

import json
import mmap
import weakref
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from offload.streaming.blocks import Block
from offload.streaming.piecewise import PiecewiseParameter
from offload.tensor_file import Place, read_header

_INDEX = "model.safetensors.index.json"

_mapped: set[int] = set()  # addresses of the files that are mapped now


def map_file(path: str | PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU, over its bytes.

    Pages are read when they are touched. Writing to a tensor changes this process's copy of the page, not the file.

    Raises:
        ValueError: if the file is no safetensors file, or has a dtype that torch lacks.
    """
    path = Path(path)
    with path.open("rb") as file:
        size = path.stat().st_size
        places, header = read_header(path, file, size)
        begin = len(header)
        if size == begin:
            return {name: torch.empty(place.shape, dtype=place.dtype) for name, place in places.items()}
        mapped = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
    address = mapped.untyped_storage().data_ptr()
    _mapped.add(address)
    weakref.finalize(mapped.untyped_storage(), _mapped.discard, address)
    return {name: _tensor(mapped[begin + place.begin : begin + place.end], place) for name, place in places.items()}


def _tensor(part: Tensor, place: Place) -> Tensor:
    if part.data_ptr() % place.dtype.itemsize:  # a writer that did not pad its header
        part = part.clone()
    return part.view(place.dtype).view(place.shape)


def map_checkpoint(path: str | PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a folder with one or with shards and their index.

    Raises:
        ValueError: if there is none.
    """
    path = Path(path)
    if path.is_file():
        return map_file(path)
    if (path / _INDEX).is_file():
        shards = _shards_of(path / _INDEX)
    else:
        shards = sorted(file.name for file in path.glob("*.safetensors"))
    if not shards:
        raise ValueError(f"{path} has no safetensors files to stream from; save the model with save_pretrained()")
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        tensors.update(map_file(path / shard))
    return tensors


def _shards_of(index: Path) -> list[str]:
    """Names of the files that an index lists. Each is beside the index, or it is refused."""
    try:
        content = json.loads(index.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{index} is no JSON: {error}") from None
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{index} has no weight_map: it is no index of safetensors files")
    for file in files.values():
        if not isinstance(file, str) or file in ("", ".", "..") or Path(file).name != file or "\0" in file:
            raise ValueError(f"{index} names {file!r}, which is no name of a file beside it")
    return sorted(set(files.values()))


def spill(blocks: Iterable[Block], folder: str | PathLike[str]) -> None:
    """Write the blocks' weights to files in ``folder``, one a block, and let the weights show those."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for block in blocks:
        file = folder / f"{block.name or 'model'}.safetensors"
        save_file({weight.name: weight.tensor.data.to("cpu").contiguous() for weight in block.weights}, file)
        mapped = map_file(file)
        for weight in block.weights:
            weight.tensor.data = mapped[weight.name]


def is_mapped(block: Block) -> bool:
    """Whether all weights of ``block`` lie in files mapped here."""
    return all(
        isinstance(weight.tensor, PiecewiseParameter) or weight.tensor.untyped_storage().data_ptr() in _mapped
        for weight in block.weights
    )


def common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The floating dtype of most elements."""
    numel: dict[torch.dtype, int] = {}
    for tensor in tensors:
        if tensor.is_floating_point():
            numel[tensor.dtype] = numel.get(tensor.dtype, 0) + tensor.numel()
    return max(numel, key=lambda dtype: numel[dtype], default=torch.float32)
