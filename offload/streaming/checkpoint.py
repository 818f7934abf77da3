"""Weights in safetensors files, memory-mapped: read when a layer is, and never held twice.

The format (https://huggingface.co/docs/safetensors): eight bytes with the length of a JSON header, the header with each
tensor's dtype, shape and place, then the tensors' bytes. Read here because a mapping of our own stays mapped for as
long as the model streams, whatever a library's loader copies.
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

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
_INDEX = "model.safetensors.index.json"
_LENGTH_BYTES = 8

_mapped: set[int] = set()  # addresses of the files that are mapped now


def map_file(path: str | PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU, over its bytes.

    Pages are read when they are touched. Writing to a tensor changes this process's copy of the page, not the file.

    Raises:
        ValueError: if the file is no safetensors file, or has a dtype that torch lacks.
    """
    path = Path(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        begin = _LENGTH_BYTES + length
        size = path.stat().st_size
        if not 0 < length <= size - _LENGTH_BYTES:
            raise ValueError(f"{path} is no safetensors file: a header of {length} bytes in a file of {size}")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path} is no safetensors file: its header is no JSON") from error
        if size == begin:
            return {}
        mapped = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
    address = mapped.untyped_storage().data_ptr()
    _mapped.add(address)
    weakref.finalize(mapped.untyped_storage(), _mapped.discard, address)
    return {
        name: _tensor(path, mapped[begin:], name, entry) for name, entry in header.items() if name != "__metadata__"
    }


def _tensor(path: Path, data: Tensor, name: str, entry: dict[str, object]) -> Tensor:
    dtype, shape, offsets = _DTYPES.get(str(entry["dtype"])), entry["shape"], entry["data_offsets"]
    if dtype is None:
        raise ValueError(f"{path}: tensor {name!r} has dtype {entry['dtype']}; known are {', '.join(_DTYPES)}")
    assert isinstance(shape, list)
    assert isinstance(offsets, list)
    first, end = offsets
    if not 0 <= first <= end <= data.numel() or end - first != torch.Size(shape).numel() * dtype.itemsize:
        raise ValueError(f"{path}: tensor {name!r} has bytes {first} to {end}, which do not hold {shape} of {dtype}")
    part = data[first:end]
    if part.data_ptr() % dtype.itemsize:  # a writer that did not pad its header
        part = part.clone()
    return part.view(dtype).view(shape)


def map_checkpoint(path: str | PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a folder with one or with shards and their index.

    Raises:
        ValueError: if there is none.
    """
    path = Path(path)
    if path.is_file():
        return map_file(path)
    if (path / _INDEX).is_file():
        shards = sorted(set(json.loads((path / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        shards = sorted(file.name for file in path.glob("*.safetensors"))
    if not shards:
        raise ValueError(f"{path} has no safetensors files to stream from; save the model with save_pretrained()")
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        tensors.update(map_file(path / shard))
    return tensors


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
    return all(weight.tensor.untyped_storage().data_ptr() in _mapped for weight in block.weights)


def common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The floating dtype of most elements."""
    numel: dict[torch.dtype, int] = {}
    for tensor in tensors:
        if tensor.is_floating_point():
            numel[tensor.dtype] = numel.get(tensor.dtype, 0) + tensor.numel()
    return max(numel, key=lambda dtype: numel[dtype], default=torch.float32)
