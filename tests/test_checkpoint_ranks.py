"""Checkpoints of several ranks, each with some of the parameters: saved by any number, loaded by any other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import offload
from offload import CheckpointError, Stride
from offload.checkpoint.folder import read_index
from tests.checkpoint_ranks import in_threads, raise_any, shard
from tests.training import assert_same_bits, mlp, snapshot, state_snapshot, train

pytestmark = pytest.mark.usefixtures("one_torch_thread")

ROOT = Path(__file__).resolve().parent.parent


def make(rank: int = 0, size: int = 1, seed: int = 0, **kwargs: Any) -> tuple[nn.Sequential, offload.AdamW]:
    model = mlp(dtype=torch.bfloat16, seed=seed)
    return model, offload.AdamW(shard(model, rank, size), **{"plan": "host", "subgroup_numel": 100, **kwargs})


def by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """State of the parameters that the optimizer holds."""
    names = {param: name for name, param in model.named_parameters()}
    return {
        names[param]: {key: value.clone() for key, value in entry.items()} for param, entry in optimizer.state.items()
    }


def save_by(size: int, path: Path, **kwargs: Any) -> dict[str, Any]:
    """Trained optimizers of ``size`` ranks, saved together. Returns the state of all parameters by name."""
    held: dict[str, Any] = {}

    def work(rank: int) -> None:
        model, optimizer = make(rank, size, **kwargs)
        train(model, optimizer, steps=range(1 + rank))
        held.update(by_name(model, optimizer))
        offload.save(path, optimizer, model)

    raise_any(in_threads(size, work))
    return held


@pytest.mark.parametrize(("saved_by", "loaded_by"), [(1, 2), (2, 1), (2, 2), (2, 3), (3, 2)])
def test_every_rank_gets_what_it_holds(tmp_path: Path, saved_by: int, loaded_by: int) -> None:
    held = save_by(saved_by, tmp_path / "a")
    assert len(held) == 8
    found: dict[str, Any] = {}

    def work(rank: int) -> None:
        model, optimizer = make(loaded_by - 1 - rank, loaded_by, seed=1, plan=Stride(2))
        offload.load(tmp_path / "a", optimizer, model)
        found.update(by_name(model, optimizer))

    raise_any(in_threads(loaded_by, work))
    assert_same_bits(found, held)


def test_what_all_ranks_hold_is_saved_once(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        model, optimizer = make()
        train(model, optimizer, steps=range(2))
        offload.save(tmp_path / "a", optimizer, model)

    raise_any(in_threads(2, work))
    index, _ = read_index(tmp_path / "a")
    assert [*index.files] == ["rank0-optimizer-0.safetensors", "rank0-model-0.safetensors"]
    model, optimizer = make()
    offload.load(tmp_path / "a", optimizer, model)


@pytest.mark.parametrize("damaged", [0, 1])
def test_what_one_rank_refuses_all_refuse(tmp_path: Path, damaged: int) -> None:
    """Before any of them has changed anything."""
    save_by(2, tmp_path / "a")
    (file,) = (tmp_path / "a").glob(f"data-*/rank{damaged}-optimizer-0.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    made = [make(rank, 2, seed=1) for rank in range(2)]
    for model, optimizer in made:
        train(model, optimizer, steps=range(1))
    before = [(snapshot(model), state_snapshot(optimizer)) for model, optimizer in made]
    refused = in_threads(2, lambda rank: offload.load(tmp_path / "a", made[rank][1], made[rank][0]))
    assert isinstance(refused[damaged], CheckpointError)
    assert isinstance(refused[1 - damaged], RuntimeError)
    assert f"rank {damaged} failed: " in str(refused[1 - damaged])
    assert_same_bits([(snapshot(model), state_snapshot(optimizer)) for model, optimizer in made], before)


def test_what_one_rank_cannot_save_none_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = save_by(2, tmp_path / "a")
    before = sorted((tmp_path / "a").rglob("*"))
    real = offload.checkpoint.saving._write

    def write(folder: Path, part: Any, stream: Any, rank: int) -> Any:
        if rank == 1:
            raise OSError("no space left")
        return real(folder, part, stream, rank)

    monkeypatch.setattr(offload.checkpoint.saving, "_write", write)

    def work(rank: int) -> None:
        model, optimizer = make(rank, 2)
        offload.save(tmp_path / "a", optimizer, model)

    failed = in_threads(2, work)
    assert isinstance(failed[0], RuntimeError)
    assert "rank 1 failed: OSError: no space left" in str(failed[0])
    assert isinstance(failed[1], OSError)
    assert sorted((tmp_path / "a").rglob("*")) == before
    assert len(held) == 8


def test_ranks_that_hold_a_parameter_in_parts_are_refused(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        weight = nn.Parameter(torch.zeros(4 + rank))
        offload.save(tmp_path / "a", offload.AdamW([("weight", weight)]))

    refused = in_threads(2, work)
    assert isinstance(refused[1], ValueError)
    assert "'weight' is of (5,) here and of (4,) in another rank" in str(refused[1])


def test_ranks_with_optimizers_of_two_kinds_are_refused(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        model, optimizer = make(rank, 2, state_format=("fp32", "int8")[rank])
        offload.save(tmp_path / "a", optimizer, model)

    refused = in_threads(2, work)
    assert isinstance(refused[0], ValueError)
    assert "ranks save AdamW in fp32 and AdamW in int8" in str(refused[0])
    assert not [*(tmp_path / "a").glob("*data*")]


def test_a_parameter_that_no_rank_holds_is_missed(tmp_path: Path) -> None:
    save_by(1, tmp_path / "a")

    def work(rank: int) -> None:
        model, optimizer = make(rank, 3)  # the third is not there
        offload.load(tmp_path / "a", optimizer, model)

    for refused in in_threads(2, work):
        assert isinstance(refused, CheckpointError)
        assert "2 parameters that no optimizer here holds, first '2.weight'" in str(refused)


@pytest.mark.slow  # four processes, one after another
def test_two_processes_and_torchs_distributed_checkpoint(tmp_path: Path) -> None:
    """1 -> 2 -> 2 -> 1 over gloo, in this package's format and in torch's; see ``main`` of checkpoint_ranks.py."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model, optimizer = make()
    train(model, optimizer, steps=range(3))
    offload.save(tmp_path / "one", optimizer, model, extra={"step": 3})
    model_state, state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": model_state, "optimizer": state}, checkpoint_id=tmp_path / "one-dcp")

    command = [sys.executable, "-m", "tests.checkpoint_ranks", str(tmp_path)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), "2"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(2)
    ]
    for rank, process in enumerate(ranks):
        output, _ = process.communicate(timeout=250)
        assert process.returncode == 0, f"rank {rank}: {output}"

    one, its_optimizer = make(seed=1, plan=Stride(2))
    offload.load(tmp_path / "two", its_optimizer, one)
    twin, twin_optimizer = make(seed=2, subgroup_numel=900)
    model_state, state = get_state_dict(twin, twin_optimizer, options=options)
    dcp.load({"model": model_state, "optimizer": state}, checkpoint_id=tmp_path / "two-dcp")
    set_state_dict(twin, twin_optimizer, model_state_dict=model_state, optim_state_dict=state, options=options)
    assert_same_bits(state_snapshot(twin_optimizer), state_snapshot(its_optimizer))
    train(model, optimizer, steps=range(7, 8))
    assert_same_bits(snapshot(one), snapshot(model))
    assert_same_bits(state_snapshot(its_optimizer), state_snapshot(optimizer))
