"""What is read from files that anyone may have written: refused with a ValueError or understood, nothing else."""

from __future__ import annotations

import json
import random
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import offload
from offload import CheckpointError, HardwareProfile, Plan, PlanError
from offload.checkpoint.index import Index
from offload.streaming.checkpoint import map_checkpoint, map_file
from offload.tensor_file import TensorFileWriter, parse_header
from tests.training import assert_same_bits, mlp, snapshot, state_snapshot, train

pytestmark = pytest.mark.usefixtures("one_torch_thread")

FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SCALARS = st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=8)
JSON = st.recursive(
    SCALARS,
    lambda each: st.lists(each, max_size=4) | st.dictionaries(st.text(max_size=8), each, max_size=4),
    max_leaves=8,
)


# ---- safetensors headers

ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I8", "U8", "F3"]) | JSON,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | JSON,
    }
)


@FEW
@given(
    st.binary(max_size=64)
    | st.dictionaries(st.text(max_size=3), ENTRIES | JSON, max_size=3).map(lambda x: json.dumps(x).encode())
)
def test_headers_are_refused_or_lie_within_the_file(header: bytes) -> None:
    try:
        places = parse_header(header, 40)
    except ValueError:
        return
    assert sorted(begin for place in places.values() for begin in range(place.begin, place.end)) == [*range(40)]
    for place in places.values():
        assert torch.empty(place.shape, dtype=place.dtype, device="meta").nbytes == place.end - place.begin


def entry(begin: int, end: int, dtype: str = "I8", shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(0, 30), "b": entry(20, 40)}, "tensor 'b' begins at byte 20 of the data, not at 30"),
        ({"a": entry(0, 10), "b": entry(20, 40)}, "tensor 'b' begins at byte 20 of the data, not at 10"),
        ({"a": entry(0, 48)}, "its tensors hold 48 bytes and the file 40 of data"),
        ({"a": entry(0, 39)}, "its tensors hold 39 bytes and the file 40 of data"),
        ({"a": entry(0, 40, shape=[41])}, r"tensor 'a' has bytes 0 to 40, which do not hold \[41\] of torch.int8"),
        ({"a": entry(0, 40, dtype="F32")}, r"which do not hold \[40\] of torch.float32"),
        ({"a": entry(0, 40, shape=[-2, -20])}, r"tensor 'a' has shape \[-2, -20\]"),
        ({"a": entry(0, 40, shape=[2**64])}, "tensor 'a' has shape"),
        ({"a": entry(0, 40, dtype="F3")}, "tensor 'a' has dtype F3; known are"),
        ({"a": {"dtype": "I8"}}, "tensor 'a' lacks a dtype, shape or data_offsets"),
        ([], "its header is no JSON object"),
    ],
)
def test_headers_that_are_refused(header: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_header(json.dumps(header).encode(), 40)


def test_a_header_that_names_a_tensor_twice_is_refused() -> None:
    header = json.dumps(entry(0, 40))
    with pytest.raises(ValueError, match="'a' is there twice"):
        parse_header(f'{{"a": {header}, "a": {header}}}'.encode(), 40)


@FEW
@given(st.data())
def test_streamed_files_are_refused_or_mapped(tmp_path: Path, data: st.DataObject) -> None:
    file = tmp_path / "a.safetensors"
    if not (tmp_path / "good").exists():
        file.unlink(missing_ok=True)
        writer = TensorFileWriter(file, {"a": (torch.float32, (3,)), "b": (torch.int8, (5,))})
        writer.write("a", torch.ones(3))
        writer.write("b", torch.ones(5, dtype=torch.int8))
        writer.finish()
        shutil.copy(file, tmp_path / "good")
    content = bytearray((tmp_path / "good").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        tensors = map_file(file)
    except ValueError:
        return
    assert sum(tensor.nbytes for tensor in tensors.values()) <= len(content)
    for tensor in tensors.values():
        tensor.clone()


@FEW
@given(
    JSON
    | st.fixed_dictionaries(
        {"weight_map": JSON | st.dictionaries(st.text(max_size=3), st.text(max_size=9) | JSON, max_size=3)}
    )
)
def test_indices_of_shards_name_files_beside_them(tmp_path: Path, content: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        map_checkpoint(tmp_path)
    if isinstance(caught.value, FileNotFoundError):
        assert Path(caught.value.filename).parent == tmp_path


@pytest.mark.parametrize("shard", ["/etc/hostname", "../other.safetensors", "..", "", "a/b.safetensors", "a\0"])
def test_shards_outside_the_folder_are_refused(tmp_path: Path, shard: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": shard}}))
    with pytest.raises(ValueError, match="no name of a file beside it"):
        map_checkpoint(tmp_path)


# ---- a checkpoint's index


def index_content(tmp_path: Path) -> dict[str, Any]:
    model = mlp((4, 4))
    optimizer = offload.AdamW(model.parameters(), lr=torch.tensor(0.5))
    train(model, optimizer, steps=range(1))
    offload.save(tmp_path / "index", optimizer, model, extra={"step": 1})
    content: dict[str, Any] = json.loads((tmp_path / "index" / "index.json").read_text())["content"]
    return content


def with_checksum(content: Any) -> bytes:
    crc32 = zlib.crc32(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
    return json.dumps({"format": "offload-checkpoint", "version": 1, "crc32": crc32, "content": content}).encode()


def change_somewhere(value: Any, data: st.DataObject) -> Any:
    """``value`` with one part of it replaced by any JSON, or under another name."""
    if isinstance(value, dict) and value and data.draw(st.integers(0, 9)):
        changed = data.draw(st.sampled_from(sorted(value)))
        others = {key: each for key, each in value.items() if key != changed}
        if data.draw(st.integers(0, 5)) == 0:
            return {**others, data.draw(st.text(max_size=5)): value[changed]}
        return {**others, changed: change_somewhere(value[changed], data)}
    if isinstance(value, list) and value and data.draw(st.integers(0, 9)):
        at = data.draw(st.integers(0, len(value) - 1))
        return [*value[:at], change_somewhere(value[at], data), *value[at + 1 :]]
    return data.draw(JSON)


@FEW
@given(st.data())
def test_indices_are_refused_or_understood(tmp_path: Path, data: st.DataObject) -> None:
    """Even with a checksum that is right."""
    if not (tmp_path / "content").exists():
        (tmp_path / "content").write_text(json.dumps(index_content(tmp_path)))
    content = change_somewhere(json.loads((tmp_path / "content").read_text()), data)
    try:
        index = Index.parse(with_checksum(content))
    except CheckpointError:
        return
    assert Index.parse(index.dump().encode()).dump() == index.dump()
    assert "/" not in index.data
    assert not any("/" in name for name in index.files)


@FEW
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_other_files_are_no_index(content: bytes) -> None:
    with pytest.raises(CheckpointError):
        Index.parse(content)


# ---- whole checkpoints, mutated


def mutate(path: Path, rng: random.Random, other: Path) -> str:
    """Change one file as disks, copies and people do. Returns what was done."""
    file = rng.choice([each for each in sorted(path.rglob("*")) if each.is_file()])
    content = bytearray(file.read_bytes())
    size = len(content)
    kind = rng.choice(
        ["flip", "flip", "byte", "truncate", "extend", "zero", "shift", "swap", "delete", "empty", "other"]
    )
    begin = rng.randrange(size)
    end = min(size, begin + rng.choice([1, 8, 100]))
    match kind:
        case "flip":
            content[begin] ^= 1 << rng.randrange(8)
        case "byte":
            content[begin] = rng.randrange(256)
        case "truncate":
            del content[begin:]
        case "extend":
            content += rng.randbytes(rng.choice([1, 8, 4096]))
        case "zero":
            content[begin:end] = bytes(end - begin)
        case "shift":
            del content[begin:end]
        case "swap":
            half = size // 2
            content[:half], content[half : 2 * half] = content[half : 2 * half], content[:half]
        case "empty":
            content.clear()
        case "other":
            content = bytearray(rng.choice([each for each in sorted(other.rglob("*")) if each.is_file()]).read_bytes())
    if kind == "delete":
        file.unlink()
    else:
        file.write_bytes(content)
    return f"{kind} of {file.name} at {begin}"


MUTATIONS = 100


@pytest.mark.parametrize(
    "first", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(MUTATIONS, 1000, MUTATIONS))]
)
def test_mutated_checkpoints_are_refused_or_identical(tmp_path: Path, first: int) -> None:
    model = mlp((4, 4), dtype=torch.bfloat16)
    optimizer = offload.AdamW(model.parameters(), state_format="int8")
    train(model, optimizer, steps=range(2))
    offload.save(tmp_path / "good", optimizer, model)
    want = snapshot(model), state_snapshot(optimizer)
    train(model, optimizer, steps=range(2, 4))
    offload.save(tmp_path / "other", optimizer, model)
    before = snapshot(model), state_snapshot(optimizer)
    outcomes = {"refused": 0, "identical": 0}
    for seed in range(first, first + MUTATIONS):
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "a")
        what = mutate(tmp_path / "a", random.Random(seed), tmp_path / "other")
        try:
            offload.load(tmp_path / "a", optimizer, model)
        except CheckpointError:
            outcomes["refused"] += 1
            assert_same_bits((snapshot(model), state_snapshot(optimizer)), before, what)
        else:
            outcomes["identical"] += 1
            assert_same_bits((snapshot(model), state_snapshot(optimizer)), want, what)
            offload.load(tmp_path / "other", optimizer, model)
    print(outcomes)  # with -s
    assert outcomes["refused"] > MUTATIONS / 2


# ---- plans and profiles


@FEW
@given(
    st.text(max_size=40)
    | st.lists(st.from_regex(r"[DCUPGFR][0-9]{1,3}(@[0-9]{1,2})?", fullmatch=True), max_size=12).map(" ".join)
)
def test_plans_are_refused_or_proved(text: str) -> None:
    try:
        plan = Plan.parse(text)
        plan.validate(4, num_slots=2, num_staging=2)
    except PlanError:
        return
    assert Plan.parse(str(plan)) == plan


def test_a_plan_with_a_number_of_many_digits_is_refused() -> None:
    with pytest.raises(PlanError, match="no operation"):
        Plan.parse("R" + "1" * 5000)


@FEW
@given(st.data())
def test_profiles_are_refused_or_understood(tmp_path: Path, data: st.DataObject) -> None:
    HardwareProfile.load("h100-sxm-node").save(tmp_path / "good.json")
    content = change_somewhere(json.loads((tmp_path / "good.json").read_text()), data)
    (tmp_path / "changed.json").write_text(json.dumps(content))
    try:
        profile = HardwareProfile.load(tmp_path / "changed.json")
    except ValueError:
        return
    profile.describe()


@FEW
@given(st.binary(max_size=100))
def test_other_files_are_no_profile(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "changed.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"changed\.json"):
        HardwareProfile.load(tmp_path / "changed.json")
