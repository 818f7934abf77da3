"""Streaming from disk: mapped files, read ahead into a bounded ring, the same bits; and files that are not right."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

import offload
from offload.streaming.checkpoint import map_checkpoint, map_file
from offload.streaming.host_memory import RING_LENGTH
from tests.streaming_models import Model, build
from tests.test_streaming import BLOCK_BYTES, EXECUTORS, SMALL, expected, limit_host_memory, outputs, streamed
from tests.training import assert_same_bits, snapshot

safetensors_torch = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.usefixtures("one_torch_thread", "poison")


def save_shards(folder: Path) -> None:
    """A checkpoint of two files with an index, as transformers writes them."""
    state = build().state_dict()
    names = sorted(state)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, held in shards.items():
        safetensors_torch.save_file({name: state[name] for name in held}, folder / file)
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


@pytest.mark.parametrize("executor", EXECUTORS)
def test_weights_on_disk(sim: ModuleType, executor: str, tmp_path: Path) -> None:
    sim.configure(executor)
    model = build()
    handle = streamed(model, disk=tmp_path)
    assert handle.bill.host_bytes == handle.bill.pinned_bytes < RING_LENGTH * 1.2 * BLOCK_BYTES, "the ring alone"
    assert len([*tmp_path.iterdir()]) == 8
    assert_same_bits(outputs(model), expected())
    handle.synchronize()
    handle.remove()
    assert_same_bits(outputs(model, "cpu"), expected())


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_checkpoint_is_streamed_from_its_files(sim: ModuleType, executor: str, tmp_path: Path) -> None:
    sim.configure(executor)
    save_shards(tmp_path)
    model, handle = offload.stream_from_pretrained(
        tmp_path, SMALL + BLOCK_BYTES, make=Model, reserve=0, verbose=False, resident=BLOCK_BYTES
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "model-1.safetensors",
        "model-2.safetensors",
        "model.safetensors.index.json",
    ], "nothing is written"
    assert_same_bits(outputs(model), expected())
    assert_same_bits(snapshot(model), snapshot(build()))
    handle.synchronize()


def test_some_blocks_of_a_checkpoint_in_host_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_shards(tmp_path)
    kwargs = {"make": Model, "reserve": 0, "verbose": False, "disk_blocks": ["layers.1", "layers.6"]}
    with monkeypatch.context() as patch:
        limit_host_memory(patch, 5 * BLOCK_BYTES)
        with pytest.raises(offload.BudgetError, match="streamed weights need"):
            offload.stream_from_pretrained(tmp_path, SMALL, **kwargs)
    model, handle = offload.stream_from_pretrained(tmp_path, SMALL, **kwargs)
    assert 6 * BLOCK_BYTES < handle.bill.host_bytes < (6 + 2 * 1.2) * BLOCK_BYTES + 8 * 4096, "and a ring for two"
    assert_same_bits(outputs(model), expected())
    handle.synchronize()
    with pytest.raises(ValueError, match="say in which folder"):
        streamed(build(), disk_blocks=["layers.1"])


def test_changes_of_mapped_weights_are_seen_and_not_written(tmp_path: Path) -> None:
    save_shards(tmp_path)
    model, _ = offload.stream_from_pretrained(tmp_path, SMALL, make=Model, reserve=0, verbose=False)
    outputs(model, num=1)
    other = build(seed=1)
    model.load_state_dict(other.state_dict())
    assert_same_bits(outputs(model), outputs(other, "cpu"))
    assert_same_bits(map_checkpoint(tmp_path)["layers.0.up.weight"], build().layers[0].up.weight.data)


def test_a_transformers_model_from_its_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from tests.test_streaming_transformers import BUDGET, generated, llama

    want = generated(llama().to("sim"))
    llama().save_pretrained(tmp_path)
    model, _ = offload.stream_from_pretrained(tmp_path, BUDGET, reserve=0, verbose=False)
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(generated(model), want)


def test_every_dtype_is_mapped_as_it_was_saved(tmp_path: Path) -> None:
    dtypes = (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
    tensors = {str(dtype): torch.arange(6).view(2, 3).to(dtype) for dtype in dtypes} | {"none": torch.empty(0, 3)}
    safetensors_torch.save_file(tensors, tmp_path / "a.safetensors")
    mapped = map_file(tmp_path / "a.safetensors")
    assert mapped.keys() == tensors.keys()
    assert all(torch.equal(mapped[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no safetensors file"),
        (b"\xff" * 64, "no safetensors file"),
        (b"\x04" + bytes(7) + b"abcd", "no JSON"),
        (
            b"\x3d" + bytes(7) + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]},"b":{}}' + bytes(8),
            "do not hold",
        ),
        (b"\x36" + bytes(7) + b'{"a":{"dtype":"F3","shape":[1],"data_offsets":[0,4]}} ' + bytes(8), "dtype F3"),
    ],
)
def test_files_that_are_no_checkpoints(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        map_file(tmp_path / "a.safetensors")


def test_checkpoints_that_do_not_fit_the_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no safetensors files"):
        offload.stream_from_pretrained(tmp_path, SMALL, make=Model)
    save_shards(tmp_path)
    with pytest.raises(ValueError, match=r"no config\.json"):
        offload.stream_from_pretrained(tmp_path, SMALL)
    with pytest.raises(ValueError, match="6 weights of the model are missing"):
        offload.stream_from_pretrained(tmp_path, SMALL, make=lambda: Model(9))
    with pytest.raises(ValueError, match="leave disk out"):
        offload.stream_from_pretrained(tmp_path, SMALL, make=Model, disk=tmp_path)
