"""Operators on the emulated device: one test for each way in which they differ from the CPU's."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

EXECUTORS = ["sync", "threads", "lazy", "eager", "random"]


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.GroupNorm(2, 8), nn.BatchNorm1d(8), nn.RMSNorm(8)])
def test_norms_in_bfloat16(sim: ModuleType, norm: nn.Module) -> None:
    """Pitfall: Meta keeps statistics in fp32, as CUDA does; the CPU's backward wants them in bf16."""
    torch.manual_seed(0)
    norm = copy.deepcopy(norm).bfloat16()
    x = torch.randn(4, 8).bfloat16()
    on_device = copy.deepcopy(norm).to("sim")
    norm(x).float().square().sum().backward()
    on_device(x.to("sim")).float().square().sum().backward()
    assert torch.equal(on_device.weight.grad.cpu(), norm.weight.grad)


def test_loss_with_resizing_out_kernel(sim: ModuleType) -> None:
    """Pitfall: the CPU's mse_loss resizes its output midway."""
    x, y = torch.randn(8, 3), torch.randn(8, 3)
    for reduction in ("mean", "sum", "none"):
        result = F.mse_loss(x.to("sim"), y.to("sim"), reduction=reduction)
        assert torch.equal(result.cpu(), F.mse_loss(x, y, reduction=reduction))


def test_boolean_mask_makes_the_host_wait(sim: ModuleType) -> None:
    """Pitfall: the Meta kernel raises Python's NotImplementedError for an index that is a mask."""
    x = torch.arange(10.0, device="sim")
    before = sim.counts()[1]
    chosen = x[x > 4]
    assert sim.counts()[1] == before + 1
    assert torch.equal(chosen.cpu(), torch.arange(5.0, 10.0))
    assert torch.equal((x > 4).nonzero().cpu().flatten(), torch.arange(5, 10))
    assert torch.equal(torch.unique(torch.tensor([3, 1, 3], device="sim")).cpu(), torch.tensor([1, 3]))


@pytest.mark.parametrize("change", [Tensor.conj, lambda x: x.conj().imag], ids=["conjugate", "negative"])
def test_bits_of_tensors_survive_copies(sim: ModuleType, change: Callable[[Tensor], Tensor]) -> None:
    """Pitfall: a conjugate is a bit of the tensor, which torch resolves by a copy that would resolve it by a copy."""
    x = torch.randn(3, 3, dtype=torch.complex64)
    expected = change(x).resolve_conj().resolve_neg()
    changed = change(x.to("sim"))
    assert changed.is_conj() or changed.is_neg()
    for result in (changed, changed.clone(), changed.contiguous(), changed.t().t(), changed.to(torch.complex128)):
        assert torch.equal(result.cpu().resolve_conj().resolve_neg(), expected.to(result.dtype))
    torch.testing.assert_close((changed @ changed).cpu(), expected @ expected)  # matrix products take the bit as it is
    into = change(torch.zeros(3, 3, dtype=torch.complex64, device="sim"))
    into.copy_(changed)
    assert torch.equal(into.cpu().resolve_conj().resolve_neg(), expected)
    assert torch.equal(change(x).to("sim").cpu().resolve_conj().resolve_neg(), expected)


def test_batch_norm_that_is_not_training(sim: ModuleType) -> None:
    """Pitfall: the CPU's kernel leaves out the statistics that Meta promises."""
    norm = nn.BatchNorm1d(4).eval()
    x = torch.randn(8, 4)
    assert torch.equal(copy.deepcopy(norm).to("sim")(x.to("sim")).cpu(), norm(x))


def test_embedding_bag(sim: ModuleType) -> None:
    """Pitfall: what the CPU's forward returns for its backward has not the shape that Meta gives it."""
    weight, indices, offsets = torch.randn(10, 4), torch.tensor([1, 2, 4, 5, 4, 3]), torch.tensor([0, 4])
    for mode in ("sum", "mean", "max"):
        grads = []
        for device in ("cpu", "sim"):
            param = weight.to(device, copy=True).requires_grad_()
            F.embedding_bag(indices.to(device), param, offsets.to(device), mode=mode).cos().sum().backward()
            grads.append(param.grad.cpu())
        assert torch.equal(*grads)


def test_sparse_tensors_are_refused(sim: ModuleType) -> None:
    embedding = nn.Embedding(10, 4, sparse=True, device="sim")
    with pytest.raises(NotImplementedError, match="sparse=False in an embedding"):
        embedding(torch.tensor([1, 2], device="sim")).sum().backward()
    for make in (
        lambda: torch.eye(3, device="sim").to_sparse(),
        lambda: torch.eye(3, device="sim").to_sparse_csr(),
        lambda: torch.eye(3).to_sparse().to("sim"),
    ):
        with pytest.raises(NotImplementedError, match="the emulated device has dense ones only"):
            make()


def test_kernels_that_are_composite_elsewhere(sim: ModuleType) -> None:
    """Where CPU and CUDA have a kernel and other devices a composite with other rounding, or none."""
    matrix, x, y = (torch.randn(shape).bfloat16() for shape in ((5, 7), 5, 7))
    assert torch.equal(torch.addr(*(tensor.to("sim") for tensor in (matrix, x, y))).cpu(), torch.addr(matrix, x, y))
    values, indices = torch.empty(0, device="sim"), torch.empty(0, dtype=torch.int64, device="sim")
    torch.mode(torch.tensor([[1.0, 2.0, 2.0]], device="sim"), out=(values, indices))
    assert values.item() == 2


def test_writing_through_a_boolean_mask(sim: ModuleType) -> None:
    """As on CUDA, the host waits for the places of several values, not for those of one."""
    x = torch.arange(12.0).reshape(3, 4)
    on_device = x.to("sim")
    mask, values = x > 4, torch.randn(7)
    device_mask, device_values, filler = mask.to("sim"), values.to("sim"), torch.tensor(-1.0, device="sim")
    for value, device_value, num_waits in ((values, device_values, 1), (filler.cpu(), filler, 0)):
        x[mask] = value
        sim.configure("lazy")
        on_device[device_mask] = device_value
        assert sim.counts()[1] == num_waits
        assert torch.equal(on_device.cpu(), x)
    x.index_put_((mask,), values, accumulate=True)
    on_device.index_put_((device_mask,), device_values, accumulate=True)
    x[1:][:, mask[0] | mask[1]] = 5.0
    on_device[1:][:, device_mask[0] | device_mask[1]] = 5.0
    assert torch.equal(on_device.cpu(), x)
    with pytest.raises(IndexError, match="does not match the shape"):
        on_device[torch.ones(2, 4, dtype=torch.bool, device="sim")]


def test_cpu_scalars_are_taken_by_value(sim: ModuleType) -> None:
    """Pitfall: 0-dim CPU tensors may be arguments, keep their type promotion, and may change afterwards."""
    sim.configure("lazy")
    scalar = torch.tensor(2.0, dtype=torch.float64)
    result = torch.ones(3, device="sim") * scalar
    scalar.fill_(100.0)
    assert result.dtype == torch.float32
    assert torch.equal(result.cpu(), torch.full((3,), 2.0))
    assert (torch.ones(3, dtype=torch.bfloat16, device="sim") * 2.5).dtype == torch.bfloat16


def test_device_mismatch(sim: ModuleType) -> None:
    x, y = torch.ones(3, device="sim"), torch.ones(3)
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        x + y
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        y.add_(x)
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        torch._foreach_add_([x], [y])


def test_bad_shapes_are_refused_at_once(sim: ModuleType) -> None:
    sim.configure("lazy")
    with pytest.raises(RuntimeError, match=r"must match the size|size mismatch|shapes cannot be multiplied"):
        torch.ones(2, 3, device="sim") @ torch.ones(2, 3, device="sim")


def test_views_take_part_in_autograd(sim: ModuleType) -> None:
    """Pitfall: views need the keys of their base, or autograd takes them for inference tensors."""
    x = torch.randn(4, 6, device="sim", requires_grad=True)
    views: list[Tensor] = [x.view(24), x.t(), x[1:3], x.reshape(2, 12), *x.split(2, 1), *x.unbind(0), x.unfold(1, 2, 2)]
    assert all(view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for view in views)
    sum(view.square().sum() for view in views).backward()
    expected = x.detach().cpu().requires_grad_()
    cpu: list[Tensor] = [expected.view(24), expected.t(), expected[1:3], expected.reshape(2, 12)]
    cpu += [*expected.split(2, 1), *expected.unbind(0), expected.unfold(1, 2, 2)]
    sum(view.square().sum() for view in cpu).backward()
    torch.testing.assert_close(x.grad.cpu(), expected.grad)
    bytes_of_x = x.detach().view(torch.int32)
    assert torch.equal(bytes_of_x.cpu(), x.detach().cpu().view(torch.int32))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_random_numbers_do_not_depend_on_the_executor(sim: ModuleType, executor: str) -> None:
    def draw() -> list[Tensor]:
        torch.manual_seed(3)
        side = torch.Stream("sim")
        x = torch.randn(100, device="sim")
        with side:
            y = torch.rand(100, device="sim")
        dropped = F.dropout(torch.ones(100, device="sim"), 0.5)
        side.synchronize()
        return [tensor.cpu() for tensor in (x, y, dropped)]

    expected = draw()
    sim.configure(executor)
    for tensor, same in zip(draw(), expected, strict=True):
        assert torch.equal(tensor, same)
    assert 20 < expected[2].count_nonzero() < 80


def test_dropout_leaves_the_host_generator_alone(sim: ModuleType) -> None:
    state = torch.get_rng_state()
    F.dropout(torch.ones(100, device="sim"), 0.5).cpu()
    assert torch.equal(torch.get_rng_state(), state)


def test_generator(sim: ModuleType) -> None:
    generator = torch.Generator("sim").manual_seed(5)
    x = torch.randn(10, device="sim", generator=generator)
    y = torch.randn(10, device="sim", generator=generator)
    generator.manual_seed(5)
    assert torch.equal(torch.randn(10, device="sim", generator=generator).cpu(), x.cpu())
    assert not torch.equal(x.cpu(), y.cpu())
    with pytest.raises(RuntimeError, match="Expected a 'sim' device type for generator"):
        torch.randn(10, device="sim", generator=torch.Generator())
    state = torch.sim.get_rng_state()
    x = torch.randn(10, device="sim")
    torch.sim.set_rng_state(state)
    assert torch.equal(torch.randn(10, device="sim").cpu(), x.cpu())


@pytest.fixture
def library() -> Iterator[torch.library.Library]:
    library = torch.library.Library("sim_test", "DEF")
    yield library
    library._destroy()


@pytest.mark.parametrize("executor", EXECUTORS)
def test_custom_operator_runs_asynchronously(sim: ModuleType, library: torch.library.Library, executor: str) -> None:
    """An operator that only changes its arguments needs a CPU kernel and nothing else."""
    library.define("axpy_(Tensor(a!) y, Tensor x, float a) -> ()")

    def axpy_(y: Tensor, x: Tensor, a: float) -> None:
        y.add_(x, alpha=a)

    library.impl("axpy_", axpy_, "CPU")
    sim.configure(executor)
    x, y = torch.ones(100, device="sim"), torch.zeros(100, device="sim")
    side = torch.Stream("sim")
    side.wait_stream(torch.accelerator.current_stream())
    with side:
        for _ in range(5):
            torch.ops.sim_test.axpy_(y, x, 2.0)
    done = side.record_event()
    assert sim.counts()[1] == 0
    done.synchronize()
    assert sim.races() == []
    with side:
        assert torch.equal(y.cpu(), torch.full((100,), 10.0))


@pytest.mark.parametrize("executor", ["sync", "threads", "lazy"])
def test_other_threads_while_an_operator_in_python_runs(
    sim: ModuleType, library: torch.library.Library, executor: str
) -> None:
    """Pitfall: who waits for the device's lock must not hold the GIL, which the operator needs to get on."""

    def increment_(x: Tensor) -> None:
        for i in range(100):
            x[i] += 1

    library.define("increment_(Tensor(a!) x) -> ()")
    library.impl("increment_", increment_, "CPU")
    sim.configure(executor)
    x = torch.zeros(100, device="sim")
    torch.accelerator.synchronize()
    side = torch.Stream("sim")

    def work() -> None:
        with side:
            for _ in range(50):
                torch.ops.sim_test.increment_(x)
                side.synchronize()

    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive():
        torch.empty(10, device="sim").record_stream(side)
        torch.accelerator.current_stream().record_event()
        sim.host_time_s()
    thread.join()
    assert torch.equal(x.cpu(), torch.full((100,), 50.0))


def test_operator_without_cpu_kernel(sim: ModuleType, library: torch.library.Library) -> None:
    library.define("nowhere(Tensor x) -> Tensor")
    with pytest.raises(NotImplementedError, match="sim_test::nowhere has no CPU kernel"):
        torch.ops.sim_test.nowhere(torch.ones(3, device="sim"))
