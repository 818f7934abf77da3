"""Several ranks: FSDP2's shards, DDP, and a checkpoint that changes the number of ranks. See tests/shards_ranks.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import offload
from offload.shards import true_on_all_ranks
from tests.launch import run_ranks
from tests.training import assert_same_bits, mlp, snapshot, train

RANKS = Path(__file__).with_name("shards_ranks.py")


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded_param(mesh: DeviceMesh, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(torch.linspace(-1, 1, 32).view(4, 8).to(dtype), mesh, [Shard(0)]))


def give_gradient(param: Any) -> None:
    param.grad = torch.ones_like(param)


def test_entries_of_state_are_spread_as_the_parameter_is(mesh: DeviceMesh) -> None:
    param: Any = sharded_param(mesh, torch.bfloat16)
    optimizer = offload.AdamW([param])
    give_gradient(param)
    optimizer.step()
    for name in ("master", "exp_avg", "exp_avg_sq"):
        entry: Any = optimizer.state[param][name]
        assert isinstance(entry, DTensor)
        assert (entry.placements, entry.shape, entry.dtype) == (param.placements, param.shape, torch.float32)
    assert type(optimizer.state[param]["step"]) is torch.Tensor


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"state_format": "int8"}, "another number of ranks"),
        ({"overlap": "next_forward"}, "overlap='next_forward' is not available for parameter 0"),
        ({"overlap": "backward"}, "use overlap='auto' or 'none'"),
    ],
)
def test_what_shards_do_not_take(mesh: DeviceMesh, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        offload.AdamW([sharded_param(mesh, torch.bfloat16)], **options)


def test_a_gradient_that_is_spread_otherwise_is_refused(mesh: DeviceMesh) -> None:
    param: Any = sharded_param(mesh)
    optimizer = offload.AdamW([param])
    param.grad = distribute_tensor(torch.ones(4, 8), mesh, [Replicate()])
    with pytest.raises(RuntimeError, match="not spread as the parameter is"):
        optimizer.step()


def test_whole_state_is_refused_where_shards_are_needed(mesh: DeviceMesh) -> None:
    param = sharded_param(mesh)
    optimizer = offload.AdamW([param])
    give_gradient(param)
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0] = {**state["state"][0], "exp_avg": torch.zeros(4, 8)}
    with pytest.raises(ValueError, match="set_optimizer_state_dict, which reshards"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_shards_are_not_saved_as_whole_parameters(mesh: DeviceMesh, tmp_path: Path, asynchronous: bool) -> None:
    param = sharded_param(mesh)
    optimizer = offload.AdamW([("weight", param)])
    words = r"parameter number 0 is spread over ranks .* use torch\.distributed\.checkpoint"
    with pytest.raises(ValueError, match=words):
        offload.save(tmp_path / "a", optimizer, asynchronous=asynchronous)
    assert not (tmp_path / "a").exists()
    offload.save(tmp_path / "a", offload.AdamW([("weight", nn.Parameter(torch.ones(4, 8)))]))
    with pytest.raises(offload.CheckpointError, match=words):
        offload.load(tmp_path / "a", optimizer)
    model = nn.ParameterDict({"weight": param.requires_grad_(False), "bias": nn.Parameter(torch.ones(2))})
    with pytest.raises(ValueError, match="parameter weight is spread"):
        offload.save(tmp_path / "b", offload.AdamW([model["bias"]]), model, asynchronous=asynchronous)


def test_a_flag_is_asked_of_every_mesh(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(dist, "all_reduce", lambda flag, op, group: asked.append(op))
    params = [torch.zeros(2), sharded_param(mesh), sharded_param(mesh)]
    assert true_on_all_ranks(True, params)
    assert not true_on_all_ranks(False, params)
    assert asked == [dist.ReduceOp.MIN] * 2


def test_parameters_that_take_the_places_of_others() -> None:
    """As Accelerate does when it shards a model whose optimizer exists already."""
    first, second = mlp(), mlp()
    optimizer = offload.AdamW(first.parameters(), lr=1e-2)
    bill = optimizer.bill
    train(first, optimizer, steps=range(1))
    before = snapshot(first)
    optimizer.param_groups[0]["params"] = list(second.parameters())
    reference = mlp()
    expected = train(reference, offload.AdamW(reference.parameters(), lr=1e-2))
    assert_same_bits(train(second, optimizer), expected)
    assert optimizer.bill == bill, "the state of parameters that nobody trains was kept"
    assert_same_bits(snapshot(first), before)
    assert len(optimizer.state_dict()["state"]) == len(list(second.parameters()))

    third = mlp()
    resumed = offload.AdamW(first.parameters(), lr=1e-2)
    resumed.param_groups[0]["params"] = list(third.parameters())
    third.load_state_dict(second.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    assert_same_bits(train(third, resumed), train(second, optimizer))


def test_entries_that_take_the_places_of_others() -> None:
    """As torch's ZeroRedundancyOptimizer loads state."""
    model, other = mlp(), mlp()
    optimizer, resumed = (offload.AdamW(m.parameters(), lr=1e-2) for m in (model, other))
    train(model, optimizer)
    other.load_state_dict(model.state_dict())
    for param, entry in zip(other.parameters(), optimizer.state.values(), strict=True):
        resumed.state[param] = {name: value.clone() for name, value in entry.items()}
    assert_same_bits(train(other, resumed), train(model, optimizer))


def test_two_ranks(tmp_path: Path) -> None:
    run_ranks(2, RANKS, str(tmp_path), "fsdp2", "nan_on_one_rank")


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_fsdp2_equals_torch_and_one_rank(num_ranks: int, tmp_path: Path) -> None:
    run_ranks(num_ranks, RANKS, str(tmp_path), "fsdp2", "fsdp2_against_one_rank", "nan_on_one_rank")


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_fsdp2_with_mixed_precision_and_replicated_shards(num_ranks: int, tmp_path: Path) -> None:
    run_ranks(num_ranks, RANKS, str(tmp_path), "fsdp2_options")


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4)])
def test_a_checkpoint_goes_to_another_number_of_ranks(before: int, after: int, tmp_path: Path) -> None:
    run_ranks(before, RANKS, str(tmp_path), "save")
    run_ranks(after, RANKS, str(tmp_path), "resume")


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ddp_and_state_spread_over_its_ranks(num_ranks: int, tmp_path: Path) -> None:
    run_ranks(num_ranks, RANKS, str(tmp_path), "ddp")


@pytest.mark.slow
def test_pipeline_stages_with_an_optimizer_each(tmp_path: Path) -> None:
    run_ranks(2, RANKS, str(tmp_path), "pipeline")
