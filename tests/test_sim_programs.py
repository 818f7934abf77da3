"""What surrounds a model in training programs, on the emulated device: compilers, generators, loaders, processes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

NUM_PROCESSES = 2


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(sim: ModuleType, fresh_compiler: None, backend: str) -> None:
    sim.configure("lazy")
    model, x = make_model(), torch.randn(5, 8)
    compiled = torch.compile(copy.deepcopy(model).to("sim"), backend=backend)
    model(x).square().sum().backward()
    compiled(x.to("sim")).square().sum().backward()
    for ours, theirs in zip(compiled.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.cpu(), theirs.grad)
    assert sim.races() == []


def test_inductor_is_refused(sim: ModuleType, fresh_compiler: None) -> None:
    """Its kernels would follow device pointers on the host, and die."""
    for model in (make_model(), nn.Linear(8, 4)):  # with kernels of its own, and only with calls of torch's
        with pytest.raises(Exception, match="compile with backend='aot_eager', or compile the model on the CPU"):
            torch.compile(model.to("sim"), backend="inductor")(torch.randn(5, 8, device="sim"))


def test_generators_are_copied_with_their_state(sim: ModuleType) -> None:
    generator = torch.Generator("sim").manual_seed(3)
    torch.rand(3, device="sim", generator=generator)
    state, other = generator.get_state(), generator.clone_state()
    expected = torch.rand(3, device="sim", generator=generator).cpu()
    assert other.device.type == "sim"
    assert torch.equal(torch.rand(3, device="sim", generator=other).cpu(), expected)
    generator.set_state(state)
    assert torch.equal(torch.rand(3, device="sim", generator=generator).cpu(), expected)


def test_fork_rng_keeps_the_state(sim: ModuleType) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3, device="sim").cpu()
    torch.manual_seed(1)
    with torch.random.fork_rng(device_type="sim"):
        torch.rand(100, device="sim")
    assert torch.equal(torch.rand(3, device="sim").cpu(), expected)


@pytest.mark.parametrize("preserve", [True, False])
def test_checkpoint_draws_again_only_if_told(sim: ModuleType, preserve: bool) -> None:
    x = torch.ones(1000, device="sim", requires_grad=True)
    dropout = nn.Dropout(0.5)
    y: Tensor = checkpoint(lambda x: dropout(x).square(), x, use_reentrant=False, preserve_rng_state=preserve)
    y.sum().backward()
    assert torch.equal((y.detach() > 0).cpu(), (x.grad > 0).cpu()) == preserve


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loader_pins_for_the_device(sim: ModuleType, num_workers: int) -> None:
    sim.configure("lazy")
    dataset = TensorDataset(torch.arange(8.0), torch.arange(8))
    loader = DataLoader(dataset, batch_size=4, pin_memory=True, num_workers=num_workers)
    sums = []
    for x, y in loader:
        assert x.is_pinned()
        assert y.is_pinned()
        sums.append(x.to("sim", non_blocking=True).sum() + y.to("sim", non_blocking=True).sum())
    assert sim.counts()[1] == 0
    assert [float(total) for total in sums] == [12.0, 44.0]


# ---- several processes


def batch(rank: int) -> Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(rank))


def train(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def trained_on_all_batches() -> dict[str, Tensor]:
    model = make_model()
    train(model, torch.cat([batch(rank) for rank in range(NUM_PROCESSES)]))
    return model.state_dict()


def replicated() -> nn.Module:
    return DistributedDataParallel(make_model().to("sim"))


def sharded() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("sim", (NUM_PROCESSES,))
    model = make_model().to("sim")
    for layer in (model[0], model[3], model):
        fully_shard(layer, mesh=mesh)
    return model


def train_on_rank(rank: int, store: str, expected: dict[str, Tensor]) -> None:
    from offload.testing import sim

    torch.set_num_threads(1)
    sim.load()
    dist.init_process_group("sim_gloo", init_method=f"file://{store}", rank=rank, world_size=NUM_PROCESSES)
    # "eager" for memory that comes back too early: FSDP2 frees gradients on the stream that reduced them.
    for make, executor in ((replicated, "lazy"), (sharded, "lazy"), (sharded, "eager")):
        sim.configure(executor)
        model = make()
        train(model, batch(rank).to("sim"))
        for name, weight in model.state_dict().items():
            whole = weight
            if isinstance(weight, DTensor):
                assert weight.to_local().device.type == "sim"
                assert weight.to_local().numel() < weight.numel()
                whole = weight.full_tensor()
            torch.testing.assert_close(whole.cpu(), expected[name.removeprefix("module.")])
        assert sim.races() == []
    dist.destroy_process_group()


def test_parallel_training(sim_device: ModuleType, tmp_path: Path) -> None:
    """With DDP and FSDP2, several processes come to the weights of one that has all batches, and no race is told of."""
    arguments = (str(tmp_path / "store"), trained_on_all_batches())
    torch.multiprocessing.spawn(train_on_rank, arguments, nprocs=NUM_PROCESSES)
