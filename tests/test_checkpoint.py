"""Checkpoints on disk: whole or not at all, refused where a byte is wrong, taken up by any optimizer of their kind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
from offload import CheckpointError, Stride, tensor_file
from offload.checkpoint import loading
from offload.checkpoint.folder import read_index
from offload.tensor_file import CHUNK_BYTES, TensorFile, TensorFileWriter
from tests.training import NUM_STEPS, TiedModel, assert_same_bits, loss_of, mlp, snapshot, state_snapshot, train

pytestmark = pytest.mark.usefixtures("one_torch_thread")

HYPER = {"lr": 3e-3, "betas": (0.8, 0.97), "weight_decay": 0.05}
FIRST, REST = range(8), range(8, NUM_STEPS)


def ours(model: nn.Module, plan: Any = "host", **kwargs: Any) -> offload.AdamW:
    return offload.AdamW(model.parameters(), plan=plan, **{"subgroup_numel": 200, **HYPER, **kwargs})


def torchs(model: nn.Module, **kwargs: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), fused=True, **{**HYPER, **kwargs})


def saved_at(path: Path, **kwargs: Any) -> tuple[nn.Sequential, offload.AdamW]:
    """A model and its optimizer after some steps, saved to ``path``."""
    model = mlp(dtype=torch.bfloat16)
    optimizer = ours(model, **kwargs)
    train(model, optimizer, steps=FIRST)
    offload.save(path, optimizer, model)
    return model, optimizer


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return snapshot(model), state_snapshot(optimizer), groups


def assert_refused(path: Path, message: str, model: nn.Module | None = None, optimizer: Any = None) -> None:
    """By a model that has been trained otherwise, of which nothing changes."""
    if model is None:
        model = mlp(dtype=torch.bfloat16, seed=5)
    if optimizer is None:
        optimizer = ours(model)
    train(model, optimizer, steps=range(2))
    before = everything(model, optimizer)
    with pytest.raises(CheckpointError, match=message):
        offload.load(path, optimizer, model)
    now = everything(model, optimizer)
    assert_same_bits(now[:2], before[:2])
    assert now[2] == before[2]
    loss_of(model, 0).backward()
    optimizer.step()  # and goes on


# ---- there and back


def test_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = saved_at(tmp_path / "a")
    expected = train(model, optimizer, steps=REST).params
    model = mlp(dtype=torch.bfloat16, seed=1)
    optimizer = ours(model, Stride(2), lr=1.0, subgroup_numel=700)
    offload.load(tmp_path / "a", optimizer, model)
    assert optimizer.param_groups[0]["lr"] == HYPER["lr"]
    assert optimizer.param_groups[0]["betas"] == HYPER["betas"]
    assert_same_bits(train(model, optimizer, steps=REST).params, expected)


def test_extra_comes_back(tmp_path: Path) -> None:
    model = mlp()
    optimizer = ours(model)
    extra = {"step": 12, "scheduler": {"last_lr": [1e-3], "best": float("inf")}, "name": "Ünï", "none": None}
    offload.save(tmp_path / "a", optimizer, model, extra=extra)
    assert offload.load(tmp_path / "a", optimizer, model) == extra
    offload.save(tmp_path / "a", optimizer, model)
    assert offload.load(tmp_path / "a", optimizer, model) == {}


def test_tensor_hyper_parameters_come_back(tmp_path: Path) -> None:
    model = mlp()
    optimizer = ours(model, lr=torch.tensor(0.1, dtype=torch.float64))
    offload.save(tmp_path / "a", optimizer, model)
    other = ours(model)
    offload.load(tmp_path / "a", other, model)
    lr = other.param_groups[0]["lr"]
    assert (lr.dtype, lr.shape, lr.item()) == (torch.float64, (), 0.1)


def test_before_the_first_step_and_without_a_gradient(tmp_path: Path) -> None:
    """A parameter that was never updated has no state, and starts again from none."""
    model = mlp()
    optimizer = ours(model)

    def drop(step: int) -> None:
        model[2].weight.grad = None

    train(model, optimizer, steps=FIRST, before_step=drop)
    offload.save(tmp_path / "a", optimizer, model)
    other = mlp(seed=1)
    other_optimizer = ours(other, Stride(2))
    train(other, other_optimizer, steps=FIRST)
    offload.load(tmp_path / "a", other_optimizer, other)
    assert other[2].weight not in other_optimizer.state
    assert_same_bits(train(other, other_optimizer, steps=REST), train(model, optimizer, steps=REST))


def test_tied_and_frozen_weights_and_buffers(tmp_path: Path) -> None:
    class Model(TiedModel):
        def __init__(self) -> None:
            super().__init__()
            self.counter: Tensor
            self.register_buffer("counter", torch.tensor(3.0))
            self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)

    model = Model()
    optimizer = offload.AdamW([p for p in model.parameters() if p.requires_grad])
    offload.save(tmp_path / "a", optimizer, model)
    index, data = read_index(tmp_path / "a")
    assert index.aliases == {"head.weight": "embedding.weight"}
    assert sum(file.stat().st_size for file in data.iterdir()) < 2 * model.embedding.weight.nbytes, "written once"
    other = Model()
    other.counter.zero_()
    offload.load(tmp_path / "a", offload.AdamW([p for p in other.parameters() if p.requires_grad]), other)
    assert_same_bits(dict(other.state_dict()), dict(model.state_dict()))
    assert other.head.weight is other.embedding.weight


def test_names_without_a_model(tmp_path: Path) -> None:
    """From an optimizer that has them, into one whose parameters come in another order."""
    model = mlp()
    optimizer = offload.AdamW(model.named_parameters(), **HYPER)
    train(model, optimizer, steps=FIRST)
    offload.save(tmp_path / "a", optimizer)
    other = mlp()
    other.load_state_dict(model.state_dict())
    other_optimizer = offload.AdamW([*other.named_parameters()][::-1], **HYPER)
    offload.load(tmp_path / "a", other_optimizer)
    assert_same_bits(train(other, other_optimizer, steps=REST).params, train(model, optimizer, steps=REST).params)


def test_positions_where_there_are_no_names(tmp_path: Path) -> None:
    model = mlp()
    optimizer = ours(model)
    train(model, optimizer, steps=FIRST)
    offload.save(tmp_path / "a", optimizer)
    other = ours(model)
    offload.load(tmp_path / "a", other)
    assert_same_bits(state_snapshot(other), state_snapshot(optimizer))
    offload.load(tmp_path / "a", offload.AdamW(model.named_parameters()))
    with pytest.raises(CheckpointError, match=r"8 parameters, this optimizer 2, and no names .* give save and load"):
        offload.load(tmp_path / "a", offload.AdamW(mlp((4, 4)).parameters()))


def test_wrappers_change_no_name(tmp_path: Path) -> None:
    model = mlp()
    optimizer = ours(model)
    offload.save(tmp_path / "a", optimizer, torch.compile(model, backend="eager"))
    offload.load(tmp_path / "a", optimizer, model)


def test_groups_with_hyper_parameters_of_their_own(tmp_path: Path) -> None:
    model = mlp()
    split = [{"params": model[:2].parameters(), "lr": 0.5}, {"params": model[2:].parameters()}]
    optimizer = offload.AdamW(split, lr=0.25)
    offload.save(tmp_path / "a", optimizer, model)
    other = offload.AdamW(
        [{"params": model[4:].parameters()}, {"params": model[2:4].parameters()}, {"params": model[:2].parameters()}]
    )
    offload.load(tmp_path / "a", other, model)
    assert [group["lr"] for group in other.param_groups] == [0.25, 0.25, 0.5]
    with pytest.raises(CheckpointError, match="group 0 were saved in groups with different"):
        offload.load(tmp_path / "a", ours(model), model)


def test_files_are_safetensors_that_the_library_reads(tmp_path: Path) -> None:
    safe_open = pytest.importorskip("safetensors").safe_open
    model, optimizer = saved_at(tmp_path / "a", state_format="bf16")
    held = {}
    for path in (tmp_path / "a").glob("data-*/*.safetensors"):
        with safe_open(path, "pt") as file:
            held.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118 - no mapping
    assert_same_bits({key: held[key] for key in model.state_dict()}, dict(model.state_dict()))
    assert_same_bits(held["0.weight.exp_avg"], optimizer.state[model[0].weight]["exp_avg"])


def test_tensors_larger_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.tensor_file.CHUNK_BYTES", 100)
    monkeypatch.setattr("offload.checkpoint.contents._FILE_BYTES", 3000)
    model, optimizer = saved_at(tmp_path / "a")
    assert len([*(tmp_path / "a").glob("data-*/*")]) > 5
    other = mlp(dtype=torch.bfloat16, seed=1)
    other_optimizer = ours(other)
    offload.load(tmp_path / "a", other_optimizer, other)
    assert_same_bits(everything(other, other_optimizer)[:2], everything(model, optimizer)[:2])


@pytest.mark.parametrize(
    "tensor", [torch.empty(0, 3), torch.tensor(2.5), torch.tensor([True, False]), torch.ones(4, 6).t()]
)
def test_odd_tensors_are_written_and_read(tmp_path: Path, tensor: Tensor) -> None:
    writer = TensorFileWriter(tmp_path / "a", {"x": (tensor.dtype, tuple(tensor.shape))})
    writer.write("x", tensor)
    stored = TensorFile(tmp_path, "a", writer.finish()).tensors["x"]
    assert torch.equal(stored.read(), tensor)
    stored.verify(torch.empty(CHUNK_BYTES, dtype=torch.uint8))


# ---- with torch's optimizers


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(("first", "second"), [(ours, torchs), (torchs, ours), (torchs, torchs)])
def test_training_goes_on_in_another_optimizer(tmp_path: Path, first: Any, second: Any, amsgrad: bool) -> None:
    model = mlp()
    optimizer = first(model, amsgrad=amsgrad)
    train(model, optimizer, steps=FIRST)
    offload.save(tmp_path / "a", optimizer, model)
    expected = train(model, optimizer, steps=REST).params
    model = mlp(seed=1)
    optimizer = second(model, amsgrad=amsgrad, lr=1.0)
    offload.load(tmp_path / "a", optimizer, model)
    if second is torchs:
        assert optimizer.param_groups[0]["fused"], "how torch computes is for whoever constructs it"
        assert "master" not in optimizer.state[model[0].weight]
    assert_same_bits(train(model, optimizer, steps=REST).params, expected)


@pytest.mark.parametrize("state_format", ["split16", "bf16", "int8"])
def test_torch_goes_on_from_a_compact_format(tmp_path: Path, state_format: str) -> None:
    """Moments as torch keeps them, in the parameter's dtype: its rounding is on top of the format's."""
    model, optimizer = saved_at(tmp_path / "a", state_format=state_format)
    whole = ours(model)
    whole.load_state_dict(optimizer.state_dict())
    other = mlp(dtype=torch.bfloat16, seed=1)
    theirs = torchs(other)
    offload.load(tmp_path / "a", theirs, other)
    assert_same_bits(snapshot(other), snapshot(model))
    for mine, param in zip(model.parameters(), other.parameters(), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            assert_same_bits(theirs.state[param][name], whole.state[mine][name].bfloat16())
        assert theirs.state[param]["step"] == len(FIRST)


def test_torchs_sgd_without_momentum_yet(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, steps=FIRST)
    offload.save(tmp_path / "a", optimizer, model)
    offload.load(tmp_path / "a", torch.optim.SGD(model.parameters(), lr=0.2), model)
    with pytest.raises(CheckpointError, match=r"lack \['amsgrad', 'betas', 'eps'\], so no AdamW was saved"):
        offload.load(tmp_path / "a", torchs(model), model)


# ---- what cannot be saved


def test_what_cannot_be_saved_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    model, optimizer = saved_at(tmp_path / "a")
    before = sorted((tmp_path / "a").rglob("*"))

    def refused(error: type[Exception], message: str, **change: Any) -> None:
        with pytest.raises(error, match=message):
            offload.save(
                tmp_path / "a",
                change.get("optimizer", optimizer),
                change.get("model", model),
                extra=change.get("extra"),
            )
        assert sorted((tmp_path / "a").rglob("*")) == before

    refused(ValueError, "8 of the optimizer's 8 parameters are not the model's, first: number 0", model=mlp())
    refused(TypeError, "extra must be made of what JSON has", extra={"rng": object()})
    optimizer.param_groups[0]["note"] = object()
    refused(TypeError, "group entry 'note' is a object")
    del optimizer.param_groups[0]["note"]
    theirs = torchs(model)
    theirs.state[model[0].weight]["note"] = "text"
    refused(TypeError, "'note' in the state of parameter 0.weight is a str", optimizer=theirs)

    class WithExtraState(nn.Sequential):
        def get_extra_state(self) -> object:
            return {"a": 1}

    refused(TypeError, "'_extra_state' of the model's state_dict is a dict", model=WithExtraState(*model))
    complex_model = nn.ParameterList(
        [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3, dtype=torch.complex64))]
    )
    optimizer = offload.AdamW([complex_model[0]])
    refused(TypeError, "'1' has dtype torch.complex64", model=complex_model, optimizer=optimizer)


def test_other_things_are_not_overwritten(tmp_path: Path) -> None:
    model = mlp()
    optimizer = ours(model)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"file is a file; a checkpoint is a folder"):
        offload.save(tmp_path / "file", optimizer)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"holds 'thesis\.tex', which is of no checkpoint"):
        offload.save(tmp_path / "folder", optimizer)
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "thesis.tex").read_text() == "mine"


# ---- whole or not at all


class Crash(BaseException):
    """A kill: nothing that follows is done, not even tidying up."""


def crash_at(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> Callable[[], int]:
    """Let the ``number``-th system call that a save needs fail, and those that follow if it is a crash.

    Of a file that was to be brought to the disk, half is there then.
    """
    count = 0

    def failing(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == number or (count > number and isinstance(error, Crash)):
                if call is real_sync and os.path.isfile(args[0]):
                    os.truncate(args[0], os.stat(args[0]).st_size // 2)
                raise error
            return call(*args, **kwargs)

        return run

    real_sync = os.fsync
    for module, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree")):
        monkeypatch.setattr(module, name, failing(getattr(module, name)))
    monkeypatch.setattr(tensor_file, "_write_all", failing(tensor_file._write_all))
    return lambda: count


@pytest.mark.parametrize(
    "error", [Crash(), OSError(errno.ENOSPC, "No space left on device")], ids=["kill", "disk full"]
)
def test_an_interrupted_save_leaves_the_last_checkpoint(tmp_path: Path, error: BaseException) -> None:
    """Wherever it is interrupted: afterwards there is the old checkpoint or the new one, and a next save tidies up."""
    model = mlp((4, 4))
    optimizer = offload.AdamW(model.parameters())
    train(model, optimizer, steps=range(2))
    offload.save(tmp_path / "a", optimizer, model)
    old = everything(model, optimizer)
    train(model, optimizer, steps=range(3))
    new = everything(model, optimizer)
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    number, outcomes = 0, []
    while True:
        number += 1
        shutil.rmtree(tmp_path / "a")
        shutil.copytree(tmp_path / "copy", tmp_path / "a")
        with pytest.MonkeyPatch.context() as patch:
            count = crash_at(patch, number, error)
            try:
                offload.save(tmp_path / "a", optimizer, model)
            except (Crash, OSError):
                failed = True
            else:
                failed = False
            if count() < number:
                break
        other = mlp((4, 4), seed=1)
        other_optimizer = offload.AdamW(other.parameters())
        offload.load(tmp_path / "a", other_optimizer, other)
        loaded = everything(other, other_optimizer)
        is_new = all(torch.equal(loaded[0][name], new[0][name]) for name in new[0])
        assert_same_bits(loaded[:2], (new if is_new else old)[:2])
        assert failed or is_new
        outcomes.append(is_new)
        offload.save(tmp_path / "a", optimizer, model)
        assert len([*(tmp_path / "a").iterdir()]) == 2, "what was left is gone"
    assert number > 10
    assert not outcomes[0]
    assert outcomes[-1]


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    model, optimizer = saved_at(tmp_path / "a")
    before = sorted((tmp_path / "a").rglob("*"))
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, 6, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(OSError, match="No space left"):
            offload.save(tmp_path / "a", optimizer, model)
    assert sorted((tmp_path / "a").rglob("*")) == before
    train(model, optimizer, steps=REST)


def test_everything_is_on_the_disk_before_the_index_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power failure loses what was not synced: every file, and every folder after its last change of names."""
    unsynced: set[str] = set()
    real_sync, real_replace, real_rename, real_make = os.fsync, os.replace, os.rename, os.mkdir

    def name_of(descriptor: int) -> str:
        return os.readlink(f"/proc/self/fd/{descriptor}")

    def sync(descriptor: int) -> None:
        unsynced.discard(name_of(descriptor))
        real_sync(descriptor)

    def rename(source: Any, target: Any) -> None:
        real_rename(source, target)
        unsynced.add(str(Path(target).parent))

    def replace(source: Any, target: Any) -> None:
        for file in tmp_path.rglob("*"):
            if file.is_file() and file.name != "index.json":
                assert str(file) in synced, file
                assert file.parent == tmp_path / "a" or file.name in names_synced[str(file.parent)], file
        assert str(tmp_path / "a") not in unsynced, "the new version's name"
        real_replace(source, target)
        unsynced.add(str(Path(target).parent))

    def make_folder(path: Any, *args: Any) -> None:
        real_make(path, *args)
        unsynced.add(str(Path(path).parent))

    synced: set[str] = set()
    names_synced: dict[str, list[str]] = {}

    def noting(descriptor: int) -> None:
        name = name_of(descriptor).replace("/.data-", "/data-")
        synced.add(name)
        if os.path.isdir(name_of(descriptor)):
            names_synced[name] = os.listdir(descriptor)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "mkdir", make_folder)
    monkeypatch.setattr(os, "replace", replace)
    saved_at(tmp_path / "a")
    assert not unsynced


# ---- refused


def flip(file: Path, position: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << bit
    file.write_bytes(content)


def data_file(path: Path, kind: str) -> Path:
    (found,) = path.glob(f"data-*/*-{kind}-*")
    return found


@pytest.mark.parametrize("kind", ["model", "optimizer"])
def test_a_flipped_bit_is_refused_and_named(tmp_path: Path, kind: str) -> None:
    saved_at(tmp_path / "a")
    flip(data_file(tmp_path / "a", kind), -1)
    last = {"model": "6.bias", "optimizer": "6.bias.exp_avg_sq"}[kind]
    assert_refused(
        tmp_path / "a", f"rank0-{kind}-0.safetensors is corrupted: the checksum of tensor '{last}' is another"
    )


@pytest.mark.parametrize("position", [0, 9, 30])
def test_a_flipped_bit_in_a_header_is_refused(tmp_path: Path, position: int) -> None:
    saved_at(tmp_path / "a")
    flip(data_file(tmp_path / "a", "optimizer"), position)
    assert_refused(tmp_path / "a", r"rank0-optimizer-0\.safetensors (is no safetensors file|is corrupted|holds other)")


def test_a_header_that_says_the_same_in_other_bytes_is_refused(tmp_path: Path) -> None:
    saved_at(tmp_path / "a")
    file = data_file(tmp_path / "a", "optimizer")
    file.write_bytes(file.read_bytes().replace(b'"shape": [', b'"shape":[ ', 1))
    assert_refused(tmp_path / "a", "corrupted: the checksum of its header is another")


@pytest.mark.parametrize("kind", ["model", "optimizer"])
def test_a_truncated_file_is_refused(tmp_path: Path, kind: str) -> None:
    saved_at(tmp_path / "a")
    file = data_file(tmp_path / "a", kind)
    size = file.stat().st_size
    os.truncate(file, size - 1)
    assert_refused(tmp_path / "a", f"has {size - 1} bytes and was written with {size}: truncated")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    saved_at(tmp_path / "a")
    data_file(tmp_path / "a", "optimizer").unlink()
    assert_refused(tmp_path / "a", r"rank0-optimizer-0\.safetensors cannot be opened: No such file")


def test_a_file_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    saved_at(tmp_path / "a")
    model = mlp(dtype=torch.bfloat16)
    offload.save(tmp_path / "b", ours(model), model)
    shutil.copy(data_file(tmp_path / "b", "model"), data_file(tmp_path / "a", "model"))
    assert_refused(tmp_path / "a", "corrupted: the checksum of tensor")


@pytest.mark.parametrize("position", [3, 40, 60, 400, -4])
def test_a_flipped_bit_in_the_index_is_refused(tmp_path: Path, position: int) -> None:
    saved_at(tmp_path / "a")
    flip(tmp_path / "a" / "index.json", position)
    assert_refused(tmp_path / "a", r"index\.json cannot be used: it")


def test_foreign_things_are_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path / "nothing", "is no checkpoint of offload.save: nothing is there")
    torch.save({}, tmp_path / "file.pt")
    assert_refused(tmp_path / "file.pt", "is no checkpoint of offload.save: a file is there")
    assert_refused(tmp_path, r"has no index\.json: it is no checkpoint of offload\.save, or the first save")
    (tmp_path / "index.json").write_text("[]")
    assert_refused(tmp_path, "the index is '\\[\\]', not dict")
    (tmp_path / "index.json").write_text('{"format": "flax"}')
    assert_refused(tmp_path, "its format is 'flax', not 'offload-checkpoint'")
    (tmp_path / "index.json").write_text('{"format": "offload-checkpoint", "version": 7}')
    assert_refused(tmp_path, "of version 7; this package reads 1")


def test_checkpoints_of_other_models_are_refused(tmp_path: Path) -> None:
    saved_at(tmp_path / "a")
    wider = mlp((16, 64, 48, 32, 16), dtype=torch.bfloat16)
    assert_refused(tmp_path / "a", r"'0.weight' has shape \(32, 16\) there and \(64, 16\) here", wider)
    deeper = mlp((16, 32, 48, 32, 16, 16), dtype=torch.bfloat16)
    assert_refused(tmp_path / "a", "lacks 2 of 10 parameters, first '8.weight'", deeper)
    shallower = mlp((16, 32, 48, 32), dtype=torch.bfloat16)
    optimizer = offload.AdamW(shallower.named_parameters())
    with pytest.raises(CheckpointError, match=r"has 2 parameters that no optimizer here holds, first '6\.bias'"):
        offload.load(tmp_path / "a", optimizer)
    with pytest.raises(CheckpointError, match=r"it has also 2 of the model's tensors, first '6\.bias'"):
        offload.load(tmp_path / "a", optimizer, shallower)


def test_a_checkpoint_without_a_model_is_loaded_into_none(tmp_path: Path) -> None:
    model = mlp(dtype=torch.bfloat16)
    optimizer = offload.AdamW(model.named_parameters())
    offload.save(tmp_path / "a", optimizer)
    assert_refused(tmp_path / "a", "saved without a model")


def test_buffers_of_another_model_are_refused(tmp_path: Path) -> None:
    saved_at(tmp_path / "a")
    model = mlp(dtype=torch.bfloat16)
    model.register_buffer("extra", torch.zeros(2))
    assert_refused(tmp_path / "a", "it lacks 1 of the model's tensors, first 'extra'", model)
    optimizer = ours(model)
    offload.save(tmp_path / "b", optimizer, model)
    assert_refused(tmp_path / "b", "it has also 1 of the model's tensors, first 'extra'")
    model.register_buffer("extra", torch.zeros(3))
    assert_refused(tmp_path / "b", r"'extra' has shape \(2,\) there and \(3,\) here", model, optimizer)


# ---- paths stay inside, and nothing is executed


def rewrite_index(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """As somebody would who can write the file: with a checksum that is right."""
    document = json.loads((path / "index.json").read_text())
    change(document["content"])
    canonical = json.dumps(document["content"], sort_keys=True, separators=(",", ":")).encode()
    document["crc32"] = zlib.crc32(canonical)
    (path / "index.json").write_text(json.dumps(document))


@pytest.mark.parametrize("data", ["/etc", "..", "../b/data-0123456789abcdef", ".", "", "data-0123456789abcdef/../.."])
def test_the_data_folder_stays_inside(tmp_path: Path, data: str) -> None:
    saved_at(tmp_path / "a")
    rewrite_index(tmp_path / "a", lambda content: content.update(data=data))
    assert_refused(tmp_path / "a", "is no name of a folder within the checkpoint")


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../rank0-model-0.safetensors", "..", "", "a\0b", "rank0-model-0.safetensors/"]
)
def test_files_stay_inside(tmp_path: Path, name: str) -> None:
    saved_at(tmp_path / "a")

    def rename(content: dict[str, Any]) -> None:
        content["files"][name] = content["files"].pop("rank0-model-0.safetensors")

    rewrite_index(tmp_path / "a", rename)
    assert_refused(tmp_path / "a", "is no name of a file within the checkpoint")


@pytest.mark.parametrize("what", ["model", "index", "data"])
def test_links_are_not_followed(tmp_path: Path, what: str) -> None:
    saved_at(tmp_path / "a")
    target = {"model": data_file(tmp_path / "a", "model"), "index": tmp_path / "a" / "index.json"}.get(
        what, data_file(tmp_path / "a", "model").parent
    )
    target.rename(tmp_path / "elsewhere")
    target.symlink_to(tmp_path / "elsewhere")
    assert_refused(tmp_path / "a", "cannot be opened|is no folder of the checkpoint")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    saved_at(tmp_path / "a")
    file = data_file(tmp_path / "a", "model")
    file.unlink()
    os.mkfifo(file)
    assert_refused(tmp_path / "a", "is no regular file")


def test_the_checkpoint_itself_may_be_a_link(tmp_path: Path) -> None:
    model, optimizer = saved_at(tmp_path / "step-8")
    (tmp_path / "latest").symlink_to("step-8")
    offload.load(tmp_path / "latest", optimizer, model)


# ---- an error after all was checked


def test_a_file_that_changes_while_it_is_loaded_breaks_the_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot be undone, so it is said, and no step goes on from it."""
    model, optimizer = saved_at(tmp_path / "a")
    real = loading.verify

    def verify_then_change(tensors: Any) -> None:
        real(tensors)
        flip(data_file(tmp_path / "a", "optimizer"), -1)

    monkeypatch.setattr(loading, "verify", verify_then_change)
    with pytest.raises(RuntimeError, match=r"failed half way, after all of it had been checked: .*corrupted"):
        offload.load(tmp_path / "a", optimizer, model)
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="this optimizer is broken"):
        optimizer.step()


# ---- memory

PEAK = """
import sys, re, torch, offload
from pathlib import Path
path, state_format = sys.argv[1:]

def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def peak_of(work):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is there now
    before = status("VmRSS")
    work()
    return status("VmHWM") - before

torch.set_num_threads(1)
model = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(1 << 19, dtype=torch.bfloat16)) for _ in range(8)])
optimizer = offload.AdamW(model.named_parameters(), plan="host", state_format=state_format, subgroup_numel=1 << 19)
for param in model:
    param.grad = torch.ones_like(param)
optimizer.step()
offload.save(path + "/warm", optimizer, model)
offload.load(path + "/warm", optimizer, model)
optimizer.step()  # which looks at the masters that were loaded
held = {}
peaks = [
    peak_of(lambda: held.update(optimizer.state_dict())),
    peak_of(lambda: torch.save(held, path + "/torch.pt")),
    peak_of(lambda: offload.save(path + "/a", optimizer, model)),
    peak_of(lambda: offload.save(path + "/a", optimizer, model, asynchronous=True).result()),
    peak_of(lambda: offload.load(path + "/a", optimizer, model)),
]
print(optimizer.bill.host_state_bytes, *peaks)
"""


@pytest.mark.parametrize("state_format", ["split16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_saving_and_loading_need_no_second_copy(tmp_path: Path, state_format: str) -> None:
    """As a fresh process sees its own peak, of state in eight subgroups: loading reads a subgroup's tensors again."""
    command = [sys.executable, "-c", PEAK, str(tmp_path), state_format]
    root = Path(__file__).resolve().parent.parent
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout
    state_bytes, *peaks = map(int, output.split())
    assert state_bytes >= 40 << 20
    of_one, slack = state_bytes // 8 + (1 << 20), 4 << 20
    state_dict, torch_save, save, beside, load = peaks
    assert max(state_dict, torch_save, save) < slack, peaks
    assert beside < 2 * of_one + slack, peaks
    assert load < state_bytes // 2, peaks
    print(state_bytes, peaks)  # with -s
