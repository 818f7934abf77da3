"""One rank of tests/test_shards.py, on gloo and the CPU, started by tests/launch.py: ``FOLDER CASE ...``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

import offload
from tests.training import assert_same_bits

PLANS = ("host", "device", offload.Stride(2))
LR, CLIP = 1e-2, 0.01  # which every step exceeds
NUM_STEPS, BATCH = 4, 8


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Its last layer has one row, so all ranks but one hold nothing of it. The numel of shards is a multiple of 16, as
    the bits of torch's fused kernel ask for (tests/test_bits.py).
    """
    torch.manual_seed(0)
    layers = [nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1, bias=False)]
    return nn.Sequential(*layers).to(dtype)


def sharded(model: nn.Sequential, mesh: DeviceMesh, **options: Any) -> nn.Sequential:
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def adamw(params: Any, plan: Any = "host", **options: Any) -> offload.AdamW:
    return offload.AdamW(params, lr=LR, plan=plan, subgroup_numel=600, **options)


def fused(params: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, lr=LR, fused=True)


def batch(step: int, rank: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(BATCH, 16, generator=torch.Generator().manual_seed(1000 * rank + step)).to(dtype)


def loss_of(model: nn.Module, step: int, rank: int) -> Tensor:
    return model(batch(step, rank, next(model.parameters()).dtype)).square().mean()


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def weights(model: nn.Module) -> list[Tensor]:
    return [whole(param) for param in model.parameters()]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    steps: Sequence[int] = range(NUM_STEPS),
    accumulation: int = 1,
) -> list[Tensor]:
    """Weights and norms: of clipped steps, each rank on batches of its own."""
    norms = []
    for step in steps:
        optimizer.zero_grad()
        for micro in range(accumulation):
            loss_of(model, 100 * micro + step, dist.get_rank()).backward()
        if isinstance(optimizer, offload.AdamW):
            norms.append(optimizer.clip_grad_norm_(CLIP))
        else:
            norms.append(whole(clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
    return [*norms, *weights(model)]


def assert_same_on_all_ranks(tensors: Sequence[Tensor]) -> None:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, [tensor.clone() for tensor in tensors])
    for other in gathered:
        assert_same_bits(other, gathered[0])


def mesh_of() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


# ---- FSDP2


def fsdp2(folder: Path) -> None:
    """The bits of torch's fused AdamW on the same shards, under three placements; the norm is that of all ranks."""
    expected = None
    for plan in PLANS:
        model = sharded(mlp(), mesh_of())
        result = train(model, adamw(model.parameters(), plan), accumulation=2)
        if expected is None:
            reference = sharded(mlp(), mesh_of())
            expected = train(reference, fused(reference.parameters()), accumulation=2)
            assert_same_on_all_ranks(result)
        assert_same_bits(result, expected)


def fsdp2_against_one_rank(folder: Path) -> None:
    """The bits of one rank that is given the reduced gradients; with two ranks, these have one rank's bits too."""
    cases = [(torch.float32, "fp32"), (torch.bfloat16, "fp32"), (torch.bfloat16, "split16"), (torch.bfloat16, "bf16")]
    for (dtype, state_format), plan in zip(cases, (*PLANS, "host"), strict=True):
        model, alone = sharded(mlp(dtype), mesh_of()), mlp(dtype)
        optimizer = adamw(model.parameters(), plan, state_format=state_format)
        single = adamw(alone.parameters(), state_format=state_format)
        for step in range(NUM_STEPS):
            optimizer.zero_grad()
            loss_of(model, step, dist.get_rank()).backward()
            optimizer.step()
            for param, shard in zip(alone.parameters(), model.parameters(), strict=True):
                param.grad = whole(shard.grad)
            single.step()
            if dist.get_world_size() == 2 and dtype == torch.float32:  # a + b is b + a; of more, the order matters
                assert_same_bits([p.grad for p in alone.parameters()], mean_gradients(mlp, alone, step))
        assert_same_bits(weights(model), weights(alone))


def mean_gradients(make: Callable[[], nn.Sequential], trained: nn.Sequential, step: int) -> list[Tensor]:
    """Gradients of one process that goes through both ranks' batches, before the step that ``trained`` has taken."""
    before = make()
    optimizer = adamw(before.parameters())
    grads: list[Tensor] = []
    for earlier in range(step + 1):
        optimizer.zero_grad()
        for rank in range(2):
            loss_of(before, earlier, rank).backward()
        grads = [param.grad.mul_(0.5) for param in before.parameters() if param.grad is not None]
        optimizer.step()
    assert_same_bits(weights(before), weights(trained))
    return grads


def fsdp2_options(folder: Path) -> None:
    """Mixed precision, and shards that are replicated (HSDP)."""
    num_ranks = dist.get_world_size()
    two_dims = init_device_mesh("cpu", (2, num_ranks // 2), mesh_dim_names=("replicate", "shard"))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for mesh, options in ((mesh_of(), {"mp_policy": policy}), (two_dims, {})):
        model, reference = sharded(mlp(), mesh, **options), sharded(mlp(), mesh, **options)
        result = train(model, adamw(model.parameters(), "device"))
        assert_same_bits(result, train(reference, fused(reference.parameters())))
        assert_same_on_all_ranks(result)


def nan_on_one_rank(folder: Path) -> None:
    """Every rank refuses the step, the ones whose shards are finite too."""
    model = sharded(mlp(), mesh_of())
    optimizer = adamw(model.parameters(), on_nonfinite="skip")
    before = weights(model)
    loss_of(model, 0, dist.get_rank()).backward()
    first: Any = next(model.parameters())
    if dist.get_rank() == dist.get_world_size() - 1:
        first.grad._local_tensor[0] = float("nan")
    optimizer.step()
    assert optimizer.num_skipped_steps == 1
    assert_same_bits(weights(model), before)
    optimizer.on_nonfinite = "error"
    is_last = dist.get_rank() == dist.get_world_size() - 1
    with pytest.raises(offload.NonFiniteGradientError, match="first: 0 of group 0" if is_last else "another rank"):
        optimizer.step()


def save(folder: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = sharded(mlp(dtype), mesh_of())
        optimizer = adamw(model.parameters(), "device")
        train(model, optimizer)
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.save(state, checkpoint_id=folder / str(dtype))
        entries = [{name: whole(value) for name, value in entry.items()} for entry in optimizer.state.values()]
        saved = weights(model), entries
        if dist.get_rank() == 0:
            torch.save(saved, folder / f"{dtype}.pt")


def resume(folder: Path) -> None:
    """On another number of ranks than :func:`save` had: weights and state, and a step that follows, are the same."""
    for dtype in (torch.float32, torch.bfloat16):
        model = sharded(mlp(dtype), mesh_of())
        optimizer = adamw(model.parameters(), offload.Stride(2))
        model_state, optimizer_state = get_state_dict(model, optimizer)
        dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / str(dtype))
        set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
        saved_weights, saved_entries = torch.load(folder / f"{dtype}.pt")
        assert_same_bits(weights(model), saved_weights)
        entries = [{name: whole(value) for name, value in entry.items()} for entry in optimizer.state.values()]
        assert_same_bits(entries, saved_entries)

        alone = mlp(dtype)
        for param, value in zip(alone.parameters(), saved_weights, strict=True):
            param.data.copy_(value)
        single = adamw(alone.parameters())
        groups = single.state_dict()["param_groups"]
        single.load_state_dict({"state": dict(enumerate(saved_entries)), "param_groups": groups})
        loss_of(model, NUM_STEPS, dist.get_rank()).backward()
        for param, shard in zip(alone.parameters(), model.parameters(), strict=True):
            param.grad = whole(shard.grad)
        optimizer.step()
        single.step()
        assert_same_bits(weights(model), weights(alone))


# ---- DDP


def ddp(folder: Path) -> None:
    """State whole on each rank, and spread over ranks by torch's ZeroRedundancyOptimizer."""
    reference = mlp()
    expected = train(DistributedDataParallel(reference), fused(reference.parameters()))
    for plan in PLANS:
        model = mlp()
        assert_same_bits(train(DistributedDataParallel(model), adamw(model.parameters(), plan)), expected)

    model, resumed = mlp(), mlp()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=offload.AdamW, lr=LR, plan="host")
    result = train(DistributedDataParallel(model), optimizer)
    assert_same_bits(result, expected)
    held = torch.tensor(optimizer.optim.bill.host_state_bytes)
    dist.all_reduce(held)
    assert held == 12 * sum(param.numel() for param in model.parameters()), "state is held more or less than once"

    optimizer.consolidate_state_dict(to=0)
    consolidated = [optimizer.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(consolidated)
    resumed.load_state_dict(model.state_dict())
    again = ZeroRedundancyOptimizer(resumed.parameters(), optimizer_class=offload.AdamW, lr=LR, plan="host")
    again.load_state_dict(consolidated[0])
    assert_same_bits(
        train(DistributedDataParallel(resumed), again, steps=[9]),
        train(DistributedDataParallel(model), optimizer, steps=[9]),
    )


# ---- pipelines


def pipeline(folder: Path) -> None:
    """Each stage of the example has the weights of one process that trains them all, micro-batch by micro-batch."""
    import examples.pipeline_stages as example

    _, stage = example.train_stage(NUM_STEPS)
    alone = example.layers()
    optimizer = fused(alone.parameters())
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        for x, target in zip(*(t.chunk(example.NUM_MICROBATCHES) for t in example.batch(step)), strict=True):
            nn.functional.mse_loss(alone(x), target).backward()
        for param in alone.parameters():
            assert param.grad is not None
            param.grad /= example.NUM_MICROBATCHES
        optimizer.step()
    expected = weights(alone)
    begin = dist.get_rank() * len(stage)
    assert_same_bits(stage, expected[begin : begin + len(stage)])


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for case in sys.argv[2:]:
        globals()[case](Path(sys.argv[1]))
    dist.destroy_process_group()
