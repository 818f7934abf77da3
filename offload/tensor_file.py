"""Safetensors files, read strictly and written a tensor at a time.

The format (https://huggingface.co/docs/safetensors): eight bytes with the length of a JSON header, the header with each
tensor's dtype, shape and place, then the tensors' bytes, without gaps. Written here because the library's writer is
given all tensors of a file at once and copies them, while state is written from where it lies; read here because each
byte is checked against a checksum on its way, and because a truncated file under a library's mapping ends the process.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the library's limit
CHUNK_BYTES = 1 << 24  # what is in memory at a time of a tensor that is written or checked

Kind = tuple[torch.dtype, tuple[int, ...]]  # dtype and shape


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies in a file's data: bytes ``begin`` to ``end``, counted from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def kind_of(tensor: Tensor) -> Kind:
    return tensor.dtype, tuple(tensor.shape)


# ---- headers


def read_header(path: str | os.PathLike[str], file: Any, size: int) -> tuple[dict[str, Place], bytes]:
    """The tensors of an open safetensors file of ``size`` bytes and its header, length included.

    Raises:
        ValueError: naming ``path`` and what is wrong.
    """
    prefix = file.read(LENGTH_BYTES)
    length = int.from_bytes(prefix, "little")
    if not 0 < length <= min(size - LENGTH_BYTES, _MAX_HEADER_BYTES):
        raise ValueError(f"{path} is no safetensors file: a header of {length} bytes in a file of {size}")
    header = file.read(length)
    try:
        return parse_header(header, size - LENGTH_BYTES - length), prefix + header
    except ValueError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error


def parse_header(header: bytes, data_bytes: int) -> dict[str, Place]:
    """The places that a header names in ``data_bytes`` of data, by name. Raises ValueError for any other bytes."""
    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is no JSON: {error}") from None
    if not isinstance(entries, dict):
        raise ValueError("its header is no JSON object")
    entries.pop("__metadata__", None)
    places = {name: _place(name, entry) for name, entry in entries.items()}
    end = 0
    for name, place in sorted(places.items(), key=lambda item: (item[1].begin, item[1].end)):
        if place.begin != end:
            raise ValueError(f"tensor {name!r} begins at byte {place.begin} of the data, not at {end}")
        end = place.end
    if end != data_bytes:
        raise ValueError(f"its tensors hold {end} bytes and the file {data_bytes} of data")
    return places


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} is there twice")
        found[key] = value
    return found


def _place(name: str, entry: object) -> Place:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"tensor {name!r} lacks a dtype, shape or data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise ValueError(f"tensor {name!r} has dtype {entry['dtype']}; known are {', '.join(DTYPES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has shape {shape!r} and data_offsets {offsets!r}")
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {name!r} has bytes {begin} to {end}, which do not hold {shape} of {dtype}")
    return Place(dtype, tuple(shape), begin, end)


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _make_header(kinds: Mapping[str, Kind]) -> bytes:
    entries, end = {}, 0
    for name, (dtype, shape) in kinds.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)  # so that the first tensor is aligned, as the library pads it
    return len(header).to_bytes(LENGTH_BYTES, "little") + header


# ---- files with checksums


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a whole file is known by.

    Attributes:
        num_bytes: its size.
        header_crc32: of the header with its length.
        tensors_crc32: of each tensor's bytes, by name.

    CRC-32 (zlib's) finds every error within 32 bits in a row and all but one in 2**32 others, several times as fast as
    a cryptographic hash. Neither would stop who can write the file: who changes it can change its checksum as well.
    """

    num_bytes: int
    header_crc32: int
    tensors_crc32: dict[str, int]


class TensorFileWriter:
    """Writes one file: tensors of these kinds, in this order, each given when it is its turn.

    Raises:
        OSError: as the file system does; what was written is of no use then.
    """

    def __init__(self, path: Path, kinds: Mapping[str, Kind]) -> None:
        header = _make_header(kinds)
        self._pending = [*kinds.items()][::-1]
        self._header_crc32 = zlib.crc32(header)
        self._tensors_crc32: dict[str, int] = {}
        self._num_bytes = len(header)
        self._file = path.open("xb", buffering=0)
        try:
            _write_all(self._file, memoryview(header))
        except BaseException:
            self._file.close()
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor, from whichever device, a chunk at a time."""
        expected = self._pending.pop()
        assert (name, kind_of(tensor)) == expected, (name, kind_of(tensor), expected)
        crc32 = 0
        for chunk in byte_chunks(tensor):
            crc32 = zlib.crc32(chunk, crc32)
            _write_all(self._file, chunk)
            self._num_bytes += chunk.nbytes
        self._tensors_crc32[name] = crc32

    def finish(self) -> FileRecord:
        """Bring the file to the disk and close it."""
        assert not self._pending, self._pending
        os.fsync(self._file.fileno())
        self._file.close()
        return FileRecord(self._num_bytes, self._header_crc32, self._tensors_crc32)

    def close(self) -> None:
        """Close the file, finished or not."""
        self._file.close()


def _write_all(file: Any, data: memoryview) -> None:
    while data.nbytes:  # an unbuffered file may take less than it is given
        data = data[file.write(data) :]


def byte_chunks(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, in order; of one on a device, no more than a chunk is on the host at a time."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for begin in range(0, flat.numel(), CHUNK_BYTES):
        yield flat[begin : begin + CHUNK_BYTES].cpu().numpy().data


def open_inside(folder: Path, name: str) -> Any:
    """Open the regular file ``name`` in ``folder`` for reading: no link, no path that leads elsewhere.

    Raises:
        ValueError: if it is anything else.
    """
    if name in ("", ".", "..") or Path(name).name != name or "\0" in name:
        raise ValueError(f"{name!r} is no name of a file within {folder}")
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a FIFO would block
    try:
        descriptor = os.open(folder / name, flags)
    except OSError as error:
        raise ValueError(f"{folder / name} cannot be opened: {error.strerror}") from error
    file = os.fdopen(descriptor, "rb", buffering=0)
    if not os.path.isfile(descriptor):
        file.close()
        raise ValueError(f"{folder / name} is no regular file")
    return file


class TensorFile:
    """A file of which a :class:`FileRecord` is known.

    Raises:
        ValueError: if its size, its header or the names of its tensors are not those of the record.
    """

    def __init__(self, folder: Path, name: str, record: FileRecord) -> None:
        self.path = folder / name
        self._folder = folder
        with open_inside(folder, name) as file:
            size = os.fstat(file.fileno()).st_size
            if size != record.num_bytes:
                raise ValueError(f"{self.path} has {size} bytes and was written with {record.num_bytes}: truncated?")
            places, header = read_header(self.path, file, size)
        if zlib.crc32(header) != record.header_crc32:
            raise ValueError(f"{self.path} is corrupted: the checksum of its header is another")
        if places.keys() != record.tensors_crc32.keys():
            raise ValueError(f"{self.path} holds other tensors than the index says")
        self.tensors = {
            key: StoredTensor(self, key, place, len(header), record.tensors_crc32[key]) for key, place in places.items()
        }

    def read(self, begin: int, into: Sequence[memoryview]) -> Iterator[memoryview]:
        """Fill one buffer after the other from byte ``begin`` on, and yield each."""
        with open_inside(self._folder, self.path.name) as file:
            file.seek(begin)
            for buffer in into:
                filled = 0
                while filled < buffer.nbytes:
                    num_bytes = file.readinto(buffer[filled:])
                    if not num_bytes:
                        raise ValueError(f"{self.path} ends early: was it changed while it was read?")
                    filled += num_bytes
                yield buffer


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A tensor in a file: its kind is known, its values are read when asked for."""

    file: TensorFile
    name: str
    place: Place
    data_begin: int
    crc32: int

    @property
    def dtype(self) -> torch.dtype:
        return self.place.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.place.shape

    @property
    def num_bytes(self) -> int:
        return self.place.end - self.place.begin

    def read(self) -> Tensor:
        """The tensor, on the CPU. Raises ValueError if its bytes are not those that were written."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self._read([*byte_chunks(tensor)])
        return tensor

    def verify(self, buffer: Tensor) -> None:
        """Raise ValueError if its bytes are not those that were written; ``buffer``: uint8, for a chunk of them."""
        chunk = buffer.numpy().data
        sizes = (min(chunk.nbytes, self.num_bytes - begin) for begin in range(0, self.num_bytes, chunk.nbytes))
        self._read([chunk[:size] for size in sizes])

    def _read(self, into: Sequence[memoryview]) -> None:
        crc32 = 0
        for chunk in self.file.read(self.data_begin + self.place.begin, into):
            crc32 = zlib.crc32(chunk, crc32)
        if crc32 != self.crc32:
            raise ValueError(f"{self.file.path} is corrupted: the checksum of tensor {self.name!r} is another")
