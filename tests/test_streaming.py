"""Streaming on the emulated accelerator: the same bits, within the budget, in every order; or an error."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
from offload.accelerators import Accelerator
from offload.limits import MemoryLimit
from offload.streaming.sources import HostSource
from tests.streaming_models import WIDTH, Block, Model, build, tokens
from tests.training import assert_same_bits, snapshot

pytestmark = pytest.mark.usefixtures("one_torch_thread", "poison")

# Late producers show in one, early overwrites in the other; the race detector watches in all.
EXECUTORS = (
    "lazy",
    "eager",
    pytest.param("sync", marks=pytest.mark.slow),
    pytest.param("random", marks=pytest.mark.slow),
)
BLOCK_BYTES = 17408  # of tests.streaming_models.Block
BASE_BYTES = 13824  # embedding and head
SMALL = BASE_BYTES + 2 * BLOCK_BYTES  # all eight blocks streamed through two places


def streamed(model: nn.Module, budget: int | str = SMALL, **kwargs: Any) -> offload.StreamHandle:
    return offload.stream(model, budget, **{"reserve": 0, "verbose": False, **kwargs})


@torch.no_grad()
def outputs(model: nn.Module, device: str = "sim", num: int = 3) -> list[Tensor]:
    return [model(tokens(seed=i).to(device)).cpu() for i in range(num)]


def expected(make: Callable[[], nn.Module] = Model, num: int = 3) -> list[Tensor]:
    return outputs(build(make), "cpu", num)


# ---- the same bits within the budget


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(
    ("num_blocks", "window", "evict_batch"), [(7, None, 1), (8, None, 1), (8, 1, 1), (7, 3, 1), (8, 3, 2), (7, 4, 4)]
)
def test_the_same_bits_in_every_order(
    sim: ModuleType, poison: list[int], executor: str, num_blocks: int, window: int | None, evict_batch: int
) -> None:
    sim.configure(executor, seed=num_blocks)
    model = build(lambda: Model(num_blocks))
    handle = streamed(model, BASE_BYTES + 4 * BLOCK_BYTES, window=window, evict_batch=evict_batch)
    assert_same_bits(outputs(model), expected(lambda: Model(num_blocks)))
    assert poison[0] > 0, "places were given away"
    handle.synchronize()


@pytest.mark.parametrize("num_resident", [0, 1, 3, 5, 8])
def test_the_budget_is_kept_and_the_bill_is_exact(sim: ModuleType, num_resident: int) -> None:
    model = build()
    budget = SMALL + num_resident * BLOCK_BYTES if num_resident < 8 else BASE_BYTES + 8 * BLOCK_BYTES
    torch.accelerator.reset_peak_memory_stats()
    handle = streamed(model, budget)
    assert len(handle.plan.resident) == num_resident
    assert torch.accelerator.max_memory_allocated() == handle.bill.weight_bytes == budget
    base = torch.accelerator.memory_allocated()
    torch.accelerator.reset_peak_memory_stats()
    assert_same_bits(outputs(model), expected())
    activations = torch.accelerator.max_memory_allocated() - base
    assert activations < 60_000, "nothing is allocated for weights while passes run"


def test_the_model_object_stays_the_same() -> None:
    model = build()
    before = {id(p): name for name, p in model.named_parameters()}
    handle = streamed(model)
    assert {id(p): name for name, p in model.named_parameters()} == before
    outputs(model)
    handle.remove()
    handle.remove()
    assert {id(p): name for name, p in model.named_parameters()} == before
    assert_same_bits(outputs(model, "cpu"), expected())
    assert "forward" not in model.__dict__
    assert all("forward" not in layer.__dict__ for layer in model.layers)
    gc.collect()
    assert torch.accelerator.memory_allocated() == 0


def test_one_copy_a_layer_and_no_waiting_for_the_device(sim: ModuleType) -> None:
    model = build()
    streamed(model)
    x = tokens().to("sim")
    with torch.no_grad():
        model(x)
        torch.accelerator.synchronize()
        sim.configure("sync")
        model(x)
    uploads = [span for span in sim.trace() if span.engine == "h2d"]
    assert len(uploads) == 8
    assert sim.counts()[1] == 0, "no operation made the host wait"


def test_the_link_is_busy_from_pass_to_pass(sim: ModuleType) -> None:
    """Where computing takes no time, the link has no pauses, between passes neither."""
    sim.set_profile(h2d_bytes_per_s=1e6, launch_s=0.0, latency_s=0.0, flops=1e18, memory_bytes_per_s=1e18)
    model = build()
    streamed(model)
    x = tokens().to("sim")
    sim.configure("sync")
    with torch.no_grad():
        for _ in range(3):
            model(x)
    torch.accelerator.synchronize()
    uploads = [span for span in sim.trace() if span.engine == "h2d"]
    total_s = uploads[-1].end_s - uploads[0].start_s
    busy_s = sum(span.end_s - span.start_s for span in uploads)
    assert busy_s > 0.99 * total_s


def test_a_pass_in_inference_mode() -> None:
    model = build()
    streamed(model)
    with torch.inference_mode():
        out = model(tokens().to("sim")).cpu()
    assert_same_bits(out.clone(), expected(num=1)[0])


def test_unequal_blocks_share_the_buffer() -> None:
    def make() -> nn.Module:
        return Model(9, lambda i: Block(inner=WIDTH * (1 + i % 3)))

    model = build(make)
    handle = streamed(model, BASE_BYTES + 80_000)
    assert handle.plan.window > 2
    assert_same_bits(outputs(model), expected(make))


def test_a_weights_memory_layout_is_kept() -> None:
    model = build()
    weight = model.layers[3].up.weight
    with torch.no_grad():
        weight.set_(weight.t().contiguous().t())
    stride = weight.stride()
    streamed(model)
    assert weight.stride() == stride
    assert_same_bits(outputs(model), expected())


# ---- budgets and plans


def test_a_budget_that_is_too_small_names_what_is_needed() -> None:
    model = build()
    with pytest.raises(offload.BudgetError, match=str(BASE_BYTES + BLOCK_BYTES)):
        streamed(model, BASE_BYTES + BLOCK_BYTES - 1)
    assert_same_bits(outputs(model, "cpu"), expected())
    assert streamed(model, BASE_BYTES + BLOCK_BYTES).plan.window == 1


def test_a_device_smaller_than_the_budget_leaves_the_model_whole(sim: ModuleType) -> None:
    def make() -> nn.Module:
        return Model(make=lambda i: Block(inner=2048))

    sim.configure(capacity="2MiB")
    model = build(make)
    with pytest.raises(torch.OutOfMemoryError):
        streamed(model, "64MiB")
    assert_same_bits(outputs(model, "cpu"), expected(make))


def test_host_memory_that_does_not_hold_a_block_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused at the third of eight blocks; those that were moved already are whole. First comes the look at all."""
    free_bytes = iter([BLOCK_BYTES, BLOCK_BYTES, BLOCK_BYTES, BLOCK_BYTES - 1])
    limits = lambda: [MemoryLimit("the limit", 10 * BLOCK_BYTES, next(free_bytes), True, "raise it")]  # noqa: E731
    monkeypatch.setattr("offload.streaming.host_memory.host_limits", limits)
    model = build()
    numbers = rf"the limit leaves .*\({BLOCK_BYTES - 1} bytes\).* needs .*\({BLOCK_BYTES} bytes\): raise it"
    with pytest.raises(offload.BudgetError, match=numbers):
        streamed(model)
    assert {param.device.type for param in model.parameters()} == {"cpu"}
    assert_same_bits(outputs(model, "cpu"), expected())


def limit_host_memory(monkeypatch: pytest.MonkeyPatch, free_bytes: int) -> None:
    limits = [MemoryLimit("the limit", 10 * free_bytes, free_bytes, True, "raise it")]
    monkeypatch.setattr("offload.streaming.host_memory.host_limits", lambda: limits)


@pytest.mark.parametrize("to_disk", [False, True])
def test_host_memory_that_does_not_hold_all_blocks_is_not_touched(
    to_disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that comes from the device: three blocks stay there, and five need room, or four and a file."""
    disk = {"disk": tmp_path, "disk_blocks": ["layers.1"]} if to_disk else {}
    needed = (4 if to_disk else 5) * BLOCK_BYTES
    limit_host_memory(monkeypatch, needed - 1)
    model = build().to("sim")
    with pytest.raises(
        offload.BudgetError, match=rf"\({needed - 1} bytes\).* streamed weights need.*\({needed} bytes\)"
    ):
        streamed(model, resident=["layers.0", "layers.3", "layers.6"], **disk, budget="1MiB")
    assert {param.device.type for param in model.parameters()} == {"sim"}
    assert not [*tmp_path.iterdir()]
    limit_host_memory(monkeypatch, needed)
    streamed(model, resident=["layers.0", "layers.3", "layers.6"], **disk, budget="1MiB")
    assert_same_bits(outputs(model), expected())


def test_the_reserve_counts_against_the_budget() -> None:
    handle = streamed(build(), SMALL + BLOCK_BYTES, reserve=BLOCK_BYTES)
    assert not handle.plan.resident
    assert handle.bill.device_bytes == SMALL + BLOCK_BYTES


def test_residents_by_bytes_and_by_names() -> None:
    handle = streamed(build(), "1MiB", resident=2 * BLOCK_BYTES)
    assert len(handle.plan.resident) == 2
    handle = streamed(build(), "1MiB", resident=["layers.0", "layers.5"])
    assert handle.plan.resident == (0, 5)
    with pytest.raises(ValueError, match=r"resident names \['layers.9'\]"):
        streamed(build(), "1MiB", resident=["layers.9"])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"window": 1, "evict_batch": 2}, "1 <= evict_batch <= window"),
        ({"evict_batch": 0}, "1 <= evict_batch"),
        ({"blocks": ["layers.20"]}, "layers.20"),
        ({"blocks": ["layers.1", "layers.1.up"]}, "inside"),
        ({"device": "cpu"}, "no accelerator"),
        ({"resident": "much"}, "resident='much'"),
        ({"profile": "nowhere"}, "no hardware profile"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        streamed(build(), "1MiB", **kwargs)


def test_a_model_without_blocks() -> None:
    with pytest.raises(ValueError, match="no repeated blocks"):
        streamed(nn.Linear(4, 4), "1MiB")


def test_named_blocks_stream_weights_outside_lists() -> None:
    model = build()
    handle = streamed(model, SMALL, blocks=["layers", "head", model.embedding])
    assert handle.plan.names[0] == "embedding"
    assert handle.plan.names[-1] == "head"
    assert_same_bits(outputs(model), expected())


def test_explain_says_where_and_how_long(capsys: pytest.CaptureFixture[str]) -> None:
    handle = offload.stream(build(), SMALL, reserve=0, profile="rtx4090-desktop")
    printed = capsys.readouterr().out
    assert printed == handle.explain() + "\n"
    assert "layers.0 … layers.7  streamed" in printed
    assert "link binds" in printed
    assert str(handle.plan).startswith("ssssssss window=2")


def test_the_link_is_measured(sim: ModuleType) -> None:
    sim.set_profile(h2d_bytes_per_s=3e9, latency_s=0.0)
    assert streamed(build()).machine.link_bytes_per_s == pytest.approx(3e9, rel=0.01)


# ---- right


class TiedModel(Model):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embedding.weight
        self.layers[5].up.weight = self.layers[2].up.weight


def test_tied_weights_stay_one_parameter() -> None:
    model = build(TiedModel)
    handle = streamed(model, "120KiB")
    assert_same_bits(outputs(model), expected(TiedModel))
    assert model.layers[5].up.weight is model.layers[2].up.weight
    assert model.layers[2].up.weight.device.type == "sim", "shared by two blocks, so it stays"
    handle.remove()
    assert model.head.weight is model.embedding.weight


class BufferBlock(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(WIDTH), persistent=False)
        self.register_buffer("num_calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        return super().forward(x * self.scale) + self.num_calls


def test_buffers_stay_on_the_device_and_keep_what_is_written() -> None:
    def make() -> nn.Module:
        return Model(make=lambda i: BufferBlock())

    model = build(make)
    handle = streamed(model, "64KiB")
    assert_same_bits(outputs(model), expected(make))
    handle.remove()
    assert all(layer.num_calls.item() == 3 for layer in model.layers)


class OddCalls(Model):
    """Calls blocks twice, out of order, and one only in later passes."""

    num_calls = 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.num_calls += 1
        x = self.embedding(tokens)
        order = [0, 1, 1, 3, 2, 5, 4, 0] + ([6] if self.num_calls > 1 else []) + ([7] if self.num_calls % 2 else [])
        for i in order:
            x = self.layers[i](x)
        return self.head(x)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("window", [1, 2, 3])
def test_modules_called_twice_out_of_order_or_only_sometimes(sim: ModuleType, executor: str, window: int) -> None:
    sim.configure(executor)
    model = build(OddCalls)
    streamed(model, "80KiB", window=window)
    assert_same_bits(outputs(model, num=5), expected(OddCalls, num=5))


def test_blocks_called_without_their_model() -> None:
    model = build()
    streamed(model)
    x = torch.ones(2, WIDTH)
    with torch.no_grad():
        want = x
        for layer in build().layers:
            want = layer(want)
        for _ in range(2):
            got = x.to("sim")
            for layer in model.layers:
                got = layer(got)
    assert_same_bits(got, want)


class Recursive(Block):
    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        x = super().forward(x)
        return self(x, depth - 1) if depth else x


def test_a_block_that_calls_itself() -> None:
    def make() -> nn.Module:
        return Model(make=lambda i: Recursive())

    model = build(make)
    streamed(model)
    assert_same_bits(outputs(model), expected(make))


def count_uploads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The streamed blocks whose copies are submitted from now on, in order."""
    uploads: list[int] = []
    real = HostSource.fetch

    def fetch(self: HostSource, layer: int, *args: Any, **kwargs: Any) -> Any:
        uploads.append(layer)
        return real(self, layer, *args, **kwargs)

    monkeypatch.setattr(HostSource, "fetch", fetch)
    return uploads


@pytest.mark.parametrize(("error", "executor"), [(ValueError, "lazy"), (KeyboardInterrupt, "eager")])
def test_an_exception_in_the_middle_of_forward_and_a_retry(
    sim: ModuleType, executor: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    sim.configure(executor)
    model = build()
    streamed(model)
    outputs(model, num=1)

    def fail(x: Tensor) -> Tensor:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(model.layers[4].down, "forward", fail)
        with pytest.raises(error):
            outputs(model)
    assert all(p.device.type == "cpu" for layer in model.layers for p in layer.parameters())
    assert_same_bits(outputs(model), expected())


def test_a_failed_pass_is_not_what_the_next_is_expected_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise blocks behind the failure come unforeseen, and first ones are loaded in their places in vain."""

    def fail(x: Tensor) -> Tensor:
        raise ValueError

    model = build()
    streamed(model)
    outputs(model, num=1)
    with monkeypatch.context() as patch:
        patch.setattr(model.layers[4].down, "forward", fail)
        with pytest.raises(ValueError):
            outputs(model, num=1)
    uploads = count_uploads(monkeypatch)
    outputs(model, num=1)
    assert uploads == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1], "each once, and the first two for the pass after"


def test_state_is_whole_while_streaming(tmp_path: Any) -> None:
    model = build()
    streamed(model, SMALL + 2 * BLOCK_BYTES)
    outputs(model, num=1)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = build(seed=1)
    other.load_state_dict(torch.load(tmp_path / "model.pt", map_location="cpu"))
    assert_same_bits(snapshot(other), snapshot(build()))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_changed_weights_are_seen_by_the_next_pass(sim: ModuleType, executor: str) -> None:
    """Copies that were loaded ahead of time for that pass are not used."""
    sim.configure(executor)
    model, other = build(), build(seed=1)
    streamed(model, SMALL + BLOCK_BYTES)
    outputs(model, num=1)
    model.load_state_dict(other.state_dict())
    assert_same_bits(outputs(model), outputs(other, "cpu"))
    with torch.no_grad():
        for m in (model, other):
            m.layers[0].up.weight.mul_(2)
            m.layers[1].up.weight.mul_(2)
    assert_same_bits(outputs(model), outputs(other, "cpu"))


class Quantised(nn.Module):
    """Linear over int8 weights with a scale a row."""

    def __init__(self, *, as_parameter: bool) -> None:
        super().__init__()
        weight = torch.randint(-127, 127, (WIDTH, WIDTH), dtype=torch.int8)
        if as_parameter:
            self.weight = nn.Parameter(weight, requires_grad=False)
        else:
            self.register_buffer("weight", weight)
        self.scale = nn.Parameter(torch.rand(WIDTH, 1) / 1000, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


@pytest.mark.parametrize("as_parameter", [True, False])
def test_quantised_weights_are_plain_bytes(as_parameter: bool) -> None:
    def make() -> nn.Module:
        return Model(make=lambda i: Quantised(as_parameter=as_parameter))

    model = build(make)
    handle = streamed(model, "20KiB")
    assert model.layers[0].weight.device.type == "cpu"
    assert handle.plan.block_bytes[0] == 1536, "1,024 bytes of weight and 128 of scale"
    assert_same_bits(outputs(model), expected(make))


class Adapter(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 4, bias=False)
        self.up = nn.Linear(4, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def add_adapters(model: nn.Module) -> None:
    torch.manual_seed(3)
    for layer in model.layers:
        layer.up = Adapter(layer.up)
    model.head = Adapter(model.head)


def test_adapters_may_join_later() -> None:
    model, reference = build(), build()
    handle = streamed(model, SMALL + 30_000, resident=0)
    outputs(model, num=1)
    before = handle.bill.base_bytes
    for m in (model, reference):
        add_adapters(m)
    assert_same_bits(outputs(model), outputs(reference, "cpu"))
    assert model.layers[0].up.down.weight.device.type == "sim"
    assert handle.bill.base_bytes > before


def test_adapters_that_exceed_the_budget_are_refused() -> None:
    model = build()
    streamed(model, SMALL)
    add_adapters(model)
    with pytest.raises(offload.BudgetError, match="joined the model"):
        outputs(model)


def test_compiled_blocks_are_not_compiled_for_each_layer() -> None:
    num_compiled = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nonlocal num_compiled
        num_compiled += 1
        return graph.forward

    torch._dynamo.reset()
    model = build()
    streamed(model)
    for layer in model.layers:
        layer.compile(backend=backend)
    assert_same_bits(outputs(model), expected())
    assert num_compiled <= 2, "once for all layers (and once more for a guard on the first)"


# ---- or refused


@pytest.mark.parametrize(
    "move", [lambda m: m.to("sim"), lambda m: m.cpu(), lambda m: m.half(), lambda m: m.layers[0].to("cpu")]
)
def test_moving_a_model_that_streams_is_refused(move: Callable[[nn.Module], object]) -> None:
    model = build()
    handle = streamed(model)
    with pytest.raises(RuntimeError, match=r"call remove\(\)"):
        move(model)
    assert_same_bits(outputs(model), expected())
    handle.remove()
    move(model)


def test_cuda_on_a_model_that_streams_is_refused() -> None:
    model = build()
    streamed(model)
    with pytest.raises(RuntimeError, match=r"call remove\(\)"):
        model.cuda()


def test_streaming_twice_is_refused() -> None:
    model = build()
    streamed(model)
    with pytest.raises(ValueError, match="streams already"):
        streamed(model)


def test_copying_a_model_that_streams_is_refused() -> None:
    model = build()
    streamed(model)
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(model)


def test_weights_of_a_block_at_rest_are_true_and_on_the_cpu() -> None:
    """Code that reads them from outside gets their values, or torch's error about devices, never other bytes."""
    model = build()
    streamed(model)
    outputs(model, num=1)
    assert_same_bits(model.layers[3].up.weight.data, build().layers[3].up.weight.data)
    with pytest.raises(RuntimeError, match="device"):
        nn.functional.linear(torch.ones(1, WIDTH, device="sim"), model.layers[3].up.weight)


class Leaky(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.up.weight.t()
        return super().forward(x)


def test_a_view_of_a_weight_that_outlives_the_call_is_refused() -> None:
    model = build(lambda: Model(make=lambda i: Leaky()))
    streamed(model)
    with pytest.raises(RuntimeError, match=r"1 tensors over weights of block 'layers.0' outlive"):
        outputs(model)


class WritesWeights(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.up.weight.mul_(0.5)
        return super().forward(x)


def test_a_block_that_changes_its_weights_is_refused() -> None:
    model = build(lambda: Model(make=lambda i: WritesWeights()))
    streamed(model)
    with pytest.raises(RuntimeError, match=r"changed its weight layers.0.up.weight in place"):
        outputs(model)


def test_weights_without_values_are_refused() -> None:
    with torch.device("meta"):
        model = Model()
    with pytest.raises(ValueError, match="meta device"):
        streamed(model)


def test_trainable_weights_that_overlap_are_refused() -> None:
    model = build()
    model.layers[1].up.weight = nn.Parameter(model.layers[0].up.weight.data)
    with pytest.raises(ValueError, match=r"layers.0.up.weight and layers.1.up.weight are two parameters"):
        streamed(model)


# ---- pinning refused


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("num_granted", [0, 5])
def test_pinning_refused(
    sim: ModuleType,
    executor: str,
    num_granted: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sim.configure(executor)
    granted = []
    real = Accelerator.pinned_empty

    def pinned_empty(self: Accelerator, num_bytes: int) -> Tensor:
        if len(granted) == num_granted:
            granted.append(None)  # once, so that a ring may be granted
            raise RuntimeError("memlock")
        granted.append(num_bytes)
        return real(self, num_bytes)

    monkeypatch.setattr(Accelerator, "pinned_empty", pinned_empty)
    model = build()
    with caplog.at_level(logging.WARNING):
        handle = streamed(model)
    assert [record.message.count("refused to pin") for record in caplog.records] == [1]
    assert_same_bits(outputs(model), expected())
    model.load_state_dict(build(seed=1).state_dict())
    assert_same_bits(outputs(model), outputs(build(seed=1), "cpu"))
    handle.synchronize()


# ---- progress


def test_progress_is_shown_for_each_pass(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    model = build()
    handle = streamed(model, progress=True)
    outputs(model, num=2)
    shown = capsys.readouterr().err
    assert "pass 1" in shown
    assert "pass 2" in shown
    assert "GB/s" in shown
    handle.remove()


class Talks(Model):
    """Generates as transformers does: as many passes as tokens, or fewer."""

    def generate(self, ids: Tensor, max_new_tokens: int = 0, fails: bool = False) -> list[Tensor]:
        if fails:
            raise ValueError("no")
        return [self(ids) for _ in range(max_new_tokens - 1)]


def test_progress_of_a_generation_is_over_all_of_its_passes(capsys: pytest.CaptureFixture[str]) -> None:
    tqdm = pytest.importorskip("tqdm")
    model = build(Talks)
    handle = streamed(model, progress=True)
    bars = []
    handle._streamer.progress._make = lambda **kwargs: bars.append(tqdm.tqdm(**kwargs, mininterval=0)) or bars[-1]
    with torch.no_grad():
        got = model.generate(tokens().to("sim"), max_new_tokens=5)
        assert_same_bits([t.cpu() for t in got], [expected(Talks, 1)[0]] * 4)
        assert (bars[0].n, bars[0].total) == (4 * 8, 5 * 8)
        assert "pass 4 of 5" in capsys.readouterr().err
        with pytest.raises(ValueError, match="no"):
            model.generate(tokens().to("sim"), max_new_tokens=5, fails=True)
        model(tokens().to("sim"))
    assert len(bars) == 3
    assert bars[-1].total == 8, "a pass of its own again"
    handle.remove()
    assert "generate" not in model.__dict__


class GenerationConfig:
    max_new_tokens = None
    max_length = 15


def test_how_many_passes_a_generation_has_at_most() -> None:
    from offload.streaming.progress import most_passes

    model = Model()
    ids = tokens(10)
    assert most_passes(model, (ids,), {"max_new_tokens": 7}) == 7
    assert most_passes(model, (ids,), {"generation_config": GenerationConfig()}) == 5
    assert most_passes(model, (), {"input_ids": ids, "max_length": 12}) == 2
    assert most_passes(model, (ids,), {"max_length": 10}) is None
    assert most_passes(model, (ids,), {}) is None
