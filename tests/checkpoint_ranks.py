"""Ranks that save and load together: as threads that take turns, and as processes over gloo (this file as a script)."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
from torch import nn

import offload
from offload.checkpoint import loading, saving
from offload.checkpoint.ranks import Ranks

_T = TypeVar("_T")


class _World:
    """Ranks that are threads. One of them works at a time, and they meet where torch's collective would be."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.local = threading.local()
        self.turn = threading.Lock()
        self._barrier = threading.Barrier(size, timeout=30)  # for a rank that is gone
        self._given: list[Any] = [None] * size

    def all_gather_object(self, gathered: list[Any], own: Any, group: object = None) -> None:
        self._given[self.local.rank] = own
        self._barrier.wait()
        gathered[:] = self._given
        self._barrier.wait()

    def ranks(self, group: object = None) -> Ranks:
        return _ThreadRanks(self)


class _ThreadRanks(Ranks):
    def __init__(self, world: _World) -> None:
        super().__init__()
        self.rank, self.size = world.local.rank, world.size
        self._turn = world.turn

    def all(self, work: Callable[[], _T]) -> list[_T]:
        def in_turn() -> _T:
            with self._turn:
                return work()

        return super().all(in_turn)


def in_threads(size: int, work: Callable[[int], _T]) -> list[_T | Exception]:
    """What ``work(rank)`` returns or raises in each of ``size`` ranks."""
    world = _World(size)
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        world.local.rank = rank
        try:
            results[rank] = work(rank)
        except Exception as error:  # noqa: BLE001 - looked at by the test
            results[rank] = error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "Ranks", world.ranks)
        patch.setattr(loading, "Ranks", world.ranks)
        patch.setattr(dist, "all_gather_object", world.all_gather_object)
        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return results


def shard(model: nn.Module, rank: int, size: int) -> list[nn.Parameter]:
    """Whole parameters, dealt out in turn."""
    return [*model.parameters()][rank::size]


def raise_any(results: Sequence[object]) -> None:
    for result in results:
        if isinstance(result, Exception):
            raise result


# ---- processes


@contextmanager
def process_group(store: str, rank: int, size: int) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def main(folder: Path, rank: int, size: int) -> None:
    """Load what one process saved, in this package's format and in torch's; train; save both; load both again."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    from tests.training import assert_same_bits, loss_of, mlp, snapshot, state_snapshot

    torch.set_num_threads(1)
    options = StateDictOptions(flatten_optimizer_state_dict=True)

    def make(part: int, seed: int) -> tuple[nn.Sequential, offload.AdamW]:
        model = mlp(dtype=torch.bfloat16, seed=seed)
        plan = ("host", offload.Stride(2))[part]
        return model, offload.AdamW(shard(model, part, size), plan=plan, subgroup_numel=100)

    def load_dcp(path: Path, model: nn.Module, optimizer: offload.AdamW) -> None:
        model_state, state = get_state_dict(model, optimizer, options=options)
        dcp.load({"model": model_state, "optimizer": state}, checkpoint_id=path)
        set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=state, options=options)

    def step(model: nn.Sequential, optimizer: offload.AdamW) -> None:
        """Each rank updates what it holds, and gets the rest from who holds that."""
        loss_of(model, 7).backward()
        optimizer.step()
        for i, param in enumerate(model.parameters()):
            dist.broadcast(param.data, src=i % size)
            param.grad = None

    model, optimizer = make(rank, seed=1)
    assert offload.load(folder / "one", optimizer, model) == {"step": 3}
    twin, twin_optimizer = make(rank, seed=2)
    load_dcp(folder / "one-dcp", twin, twin_optimizer)
    assert_same_bits(state_snapshot(twin_optimizer), state_snapshot(optimizer))
    assert_same_bits(snapshot(twin), snapshot(model))
    step(model, optimizer)

    offload.save(folder / "two", optimizer, model)
    group = dist.new_group(backend="gloo")
    saving = offload.save(folder / "two-beside", optimizer, model, asynchronous=True, group=group)
    saving.result(120)
    model_state, state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": model_state, "optimizer": state}, checkpoint_id=folder / "two-dcp")
    with pytest.raises(ValueError, match="needs a group of its own"):
        offload.save(folder / "refused", optimizer, model, asynchronous=True)

    mine = state_snapshot(optimizer)
    other, other_optimizer = make(1 - rank, seed=3)  # what the other rank held
    offload.load(folder / "two-beside", other_optimizer, other)
    assert_same_bits(snapshot(other), snapshot(model))
    back, back_optimizer = make(rank, seed=4)
    offload.load(folder / "two", back_optimizer, back)
    assert_same_bits(state_snapshot(back_optimizer), mine)

    # One rank alone finds a file corrupted; both refuse, and neither has changed.
    dist.barrier()
    if rank == 0:
        file = next((folder / "two-beside").glob("data-*/rank1-optimizer-0.safetensors"))
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    dist.barrier()
    with pytest.raises(
        (offload.CheckpointError, RuntimeError), match=r"rank1-optimizer-0\.safetensors is corrupted"
    ) as refused:
        offload.load(folder / "two-beside", back_optimizer, back)
    assert isinstance(refused.value, offload.CheckpointError) == (rank == 1)
    assert_same_bits(state_snapshot(back_optimizer), mine)
    print("rank", rank, "done")


if __name__ == "__main__":
    folder, rank, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    with process_group(os.fspath(folder / "store"), rank, size):
        main(folder, rank, size)
