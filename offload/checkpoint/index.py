"""A checkpoint's index: what it holds, of whom, and the checksums of every byte. JSON, read without trust.

    {"format": "offload-checkpoint", "version": 1, "crc32": …, "content": {…}}

``crc32`` is that of ``content`` as :func:`_canonical` writes it. A flipped bit is found by it; anything else that is
not as :meth:`Index.parse` expects is refused by what it checks.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from offload.tensor_file import DTYPES, NAMES, FileRecord, Kind

FORMAT, VERSION = "offload-checkpoint", 1
INDEX_NAME = "index.json"
DATA_NAME = re.compile(r"data-[0-9a-f]{16}")  # the folder of one version's files
FILE_NAME = re.compile(r"rank\d+-(optimizer|model)-\d+\.safetensors")
_T = TypeVar("_T")


class CheckpointError(ValueError):
    """A checkpoint that is not whole, or not one of these: what is wrong, and where. Nothing was loaded."""


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter of the optimizer.

    Attributes:
        group: number of its group in :attr:`Index.groups`.
        dtype, shape: its own; its state may have others.
        entries: names of its state's tensors; empty before its first step.
    """

    group: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    entries: tuple[str, ...]

    @property
    def kind(self) -> Kind:
        return self.dtype, self.shape


@dataclass(frozen=True, slots=True)
class Description:
    """What was saved, without the tensors: by one rank, or by all together.

    Attributes:
        optimizer: the class that was saved, for messages.
        state_format: of :class:`offload.AdamW` and its kin; "fp32" for torch's.
        named: whether parameters have their model's names; else their positions, over all groups.
        groups: hyper-parameters of each parameter group.
        params: the optimizer's parameters, in order.
        has_model: whether the model was saved.
        aliases: names of the model's tensors that are another's, which is the one saved.
    """

    optimizer: str
    state_format: str
    named: bool
    groups: tuple[dict[str, Any], ...]
    params: dict[str, Param]
    has_model: bool
    aliases: dict[str, str]


@dataclass(frozen=True, slots=True)
class Index(Description):
    """All of a checkpoint but the tensors.

    Attributes:
        data: the folder that the files are in.
        files: what each file is known by.
        extra: the user's.
    """

    data: str
    files: dict[str, FileRecord]
    extra: dict[str, Any] = field(default_factory=dict)

    def dump(self) -> str:
        """Raises TypeError for hyper-parameters or an ``extra`` that JSON has no place for."""
        content = {
            "optimizer": self.optimizer, "state_format": self.state_format, "named": self.named,
            "groups": [{key: _encoded(value, key) for key, value in group.items()} for group in self.groups],
            "params": {name: [p.group, NAMES[p.dtype], p.shape, p.entries] for name, p in self.params.items()},
            "has_model": self.has_model, "aliases": self.aliases, "data": self.data,
            "files": {name: asdict(record) for name, record in self.files.items()},
            "extra": self.extra,
        }  # fmt: skip
        try:
            crc32 = zlib.crc32(_canonical(content))
        except (TypeError, ValueError) as error:
            raise TypeError(f"extra must be made of what JSON has (dict, list, str, numbers, None): {error}") from error
        return json.dumps({"format": FORMAT, "version": VERSION, "crc32": crc32, "content": content}, indent=1)

    @classmethod
    def parse(cls, text: bytes) -> Index:
        """Raises :class:`CheckpointError` for anything that :meth:`dump` did not write."""
        try:
            document = json.loads(text.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"it is no JSON: {error}") from None
        document = _a(dict, document, "the index")
        if document.get("format") != FORMAT:
            raise CheckpointError(f"its format is {document.get('format')!r}, not {FORMAT!r}: it is another's file")
        if document.get("version") != VERSION:
            raise CheckpointError(f"it is of version {document.get('version')!r}; this package reads {VERSION}")
        content = _of(document, "content", dict)
        try:
            crc32 = zlib.crc32(_canonical(content))
        except ValueError as error:  # surrogates
            raise CheckpointError(f"it holds text that is none: {error}") from None
        if crc32 != document.get("crc32"):
            raise CheckpointError("it is corrupted: its checksum is another")
        return cls._of_content(content)

    @classmethod
    def _of_content(cls, content: Mapping[str, Any]) -> Index:
        groups = tuple(_group(group) for group in _of(content, "groups", list))
        aliases = _of(content, "aliases", dict)
        if not all(isinstance(target, str) for target in aliases.values()):
            raise CheckpointError("aliases are not all names")
        data = _of(content, "data", str)
        if not DATA_NAME.fullmatch(data):
            raise CheckpointError(f"{data!r} is no name of a folder within the checkpoint")
        return cls(
            optimizer=_of(content, "optimizer", str),
            state_format=_of(content, "state_format", str),
            named=_of(content, "named", bool),
            groups=groups,
            params={name: _param(name, p, len(groups)) for name, p in _of(content, "params", dict).items()},
            has_model=_of(content, "has_model", bool),
            aliases=aliases,
            data=data,
            files={name: _record(name, entry) for name, entry in _of(content, "files", dict).items()},
            extra=_of(content, "extra", dict),
        )


def _canonical(content: object) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _a(kind: type[_T], value: object, what: str) -> _T:
    if type(value) is not kind:  # True is an int to isinstance
        raise CheckpointError(f"{what} is {str(value)[:80]!r}, not {kind.__name__}")
    return value


def _of(entries: Mapping[str, Any], key: str, kind: type[_T]) -> _T:
    if key not in entries:
        raise CheckpointError(f"it lacks {key!r}")
    return _a(kind, entries[key], key)


def _param(name: str, entry: object, num_groups: int) -> Param:
    what = f"parameter {name!r}"
    values = _a(list, entry, what)
    if len(values) != 4:
        raise CheckpointError(f"{what} has {len(values)} values, not 4")
    group, dtype, shape, entries = values
    if _a(int, group, what) not in range(num_groups) or _a(str, dtype, what) not in DTYPES:
        raise CheckpointError(f"{what} has group {group} and dtype {dtype}")
    sizes = tuple(_a(int, size, what) for size in _a(list, shape, what))
    return Param(group, DTYPES[dtype], sizes, tuple(_a(str, each, what) for each in _a(list, entries, what)))


def _record(name: str, entry: object) -> FileRecord:
    if not FILE_NAME.fullmatch(name):
        raise CheckpointError(f"{name!r} is no name of a file within the checkpoint")
    values = _a(dict, entry, name)
    tensors = {key: _a(int, crc32, f"{name}: {key}") for key, crc32 in _of(values, "tensors_crc32", dict).items()}
    return FileRecord(_of(values, "num_bytes", int), _of(values, "header_crc32", int), tensors)


# ---- hyper-parameters: JSON, and tuples and tensors of one element besides

_TUPLE, _TENSOR = "tuple", "tensor"


def _encoded(value: object, key: str) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, tuple):
        return {_TUPLE: [_encoded(each, key) for each in value]}
    if isinstance(value, list):
        return [_encoded(each, key) for each in value]
    if isinstance(value, Tensor) and value.numel() == 1 and value.dtype in NAMES:
        return {_TENSOR: [value.item(), NAMES[value.dtype], list(value.shape)]}
    raise TypeError(f"group entry {key!r} is a {type(value).__name__}: a checkpoint keeps numbers, text and tuples")


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(each) for each in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_TUPLE}:
        return tuple(_decoded(each) for each in _a(list, value[_TUPLE], "a tuple"))
    if value.keys() == {_TENSOR}:
        return _tensor(value[_TENSOR])
    raise CheckpointError(f"a hyper-parameter is {str(value)[:80]!r}")


def _group(value: object) -> dict[str, Any]:
    return {key: _decoded(each) for key, each in _a(dict, value, "a group").items()}


def _tensor(value: object) -> Tensor:
    values = _a(list, value, "a tensor")
    if len(values) != 3 or not isinstance(values[0], (bool, int, float)) or values[1] not in [*DTYPES]:
        raise CheckpointError(f"a tensor is {str(value)[:80]!r}")
    if not isinstance(values[2], list) or any(type(size) is not int or size != 1 for size in values[2]):
        raise CheckpointError(f"a tensor of one element has shape {str(values[2])[:80]!r}")
    try:
        return torch.tensor(values[0], dtype=DTYPES[values[1]]).view(values[2])
    except (RuntimeError, OverflowError, ValueError) as error:
        raise CheckpointError(f"a tensor is {str(value)[:80]!r}: {error}") from None
