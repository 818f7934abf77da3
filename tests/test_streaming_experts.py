"""Mixtures of experts: only experts that are routed to are loaded, and those used most stay; the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import offload
from offload.lanes.ordering import AccessHistory, ordering_lanes
from offload.streaming.arena import ALIGN_BYTES
from offload.streaming.expert_cache import HALF_LIFE_PASSES, ExpertCache
from offload.streaming.prediction import SizesOnly, arena_cells
from tests.streaming_models import WIDTH, Model, build
from tests.test_streaming import EXECUTORS, expected, outputs, streamed
from tests.test_streaming_training import gradients, loss_of, reference_gradients
from tests.training import assert_same_bits, snapshot

pytestmark = pytest.mark.usefixtures("one_torch_thread", "poison")

NUM_EXPERTS, TOP_K, NUM_BLOCKS = 6, 3, 3
EXPERT_BYTES = 2 * WIDTH * WIDTH * 4


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH, bias=False)
        self.down = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class FusedExperts(nn.Module):
    """As transformers keeps them: one parameter for all experts, indexed by each that is hit."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = NUM_EXPERTS
        self.up = nn.Parameter(torch.randn(NUM_EXPERTS, WIDTH, WIDTH) / 6, requires_grad=False)
        self.down = nn.Parameter(torch.randn(NUM_EXPERTS, WIDTH, WIDTH) / 6, requires_grad=False)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for expert in sorted(set(top_k_index.flatten().tolist())):
            token, place = torch.where(top_k_index == expert)
            y = nn.functional.linear(
                torch.tanh(nn.functional.linear(hidden_states[token], self.up[expert])), self.down[expert]
            )
            out = out.index_add(0, token, y * top_k_weights[token, place, None])
        return out


class SeparateExperts(nn.ModuleList):
    def __init__(self) -> None:
        super().__init__(Expert() for _ in range(NUM_EXPERTS))


class Mixture(nn.Module):
    """A block with a router; ``favourites`` get all tokens if given."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.router = nn.Linear(WIDTH, NUM_EXPERTS, bias=False)
        self.experts = make()
        self.favourites: list[int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        flat = self.norm(x).flatten(0, -2)
        weights, index = torch.softmax(self.router(flat), -1).topk(TOP_K)
        if self.favourites is not None:
            index = torch.tensor(self.favourites, device=x.device).expand_as(index)
        if isinstance(self.experts, nn.ModuleList):
            out = torch.zeros_like(flat)
            for expert in sorted(set(index.flatten().tolist())):
                token, place = torch.where(index == expert)
                out = out.index_add(0, token, self.experts[expert](flat[token]) * weights[token, place, None])
        else:
            out = self.experts(flat, index, weights)
        return x + out.view_as(x)


def mixture(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Model(NUM_BLOCKS, lambda i: Mixture(make)).requires_grad_(False)


KINDS = pytest.mark.parametrize("make", [FusedExperts, SeparateExperts])


def budget_for(make: Callable[[], nn.Module], num_experts: int) -> int:
    """All blocks through two places, and so many experts."""
    free = streamed(build(mixture(make)), "10MiB", resident=0)
    base_bytes = free.bill.base_bytes + free.bill.arena_bytes
    free.remove()
    return base_bytes + num_experts * EXPERT_BYTES


def favour(model: nn.Module, experts: list[int]) -> None:
    for layer in model.layers:
        layer.favourites = experts


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(("make", "num_experts"), [(FusedExperts, 2), (SeparateExperts, 2), (FusedExperts, 7)])
def test_the_same_bits(sim: ModuleType, poison: list[int], executor: str, make: type, num_experts: int) -> None:
    budget = budget_for(make, num_experts)
    sim.configure(executor)
    model = build(mixture(make))
    handle = streamed(model, budget, resident=0)
    assert handle.bill.experts_bytes == num_experts * EXPERT_BYTES
    assert handle.bill.weight_bytes == budget
    assert_same_bits(outputs(model), expected(mixture(make)))
    assert poison[0] > 0, "places were given away"
    handle.remove()
    assert_same_bits(outputs(model, "cpu"), expected(mixture(make)))


@KINDS
def test_experts_that_are_not_routed_to_are_not_loaded(sim: ModuleType, make: type) -> None:
    sim.set_profile(h2d_bytes_per_s=1e6, latency_s=0.0)
    model = build(mixture(make))
    handle = streamed(model, "10MiB")
    favour(model, [4, 1, 2])
    torch.accelerator.synchronize()
    sim.configure("sync")
    outputs(model, num=3)
    assert handle.expert_cache.held() == [NUM_EXPERTS * block + e for block in range(NUM_BLOCKS) for e in (1, 2, 4)]
    uploads = [span for span in sim.trace() if span.engine == "h2d"]
    expert_bytes = sum(round((s.end_s - s.start_s) * 1e6) for s in uploads if s.end_s - s.start_s > 0.004 * 0.9)
    assert expert_bytes == 3 * NUM_BLOCKS * EXPERT_BYTES, "each once in three passes"
    assert "9 of 27 visits had to load theirs" in handle.explain()


@KINDS
def test_what_stays_follows_the_routing(make: type) -> None:
    """After a change of subject the new favourites replace the old."""
    model = build(mixture(make))
    cache = streamed(model, budget_for(make, 4), resident=0).expert_cache
    for favourite, num_passes in ((0, 2), (5, 9)):
        favour(model, [favourite] * TOP_K)
        outputs(model, num=num_passes)
        num_loads = cache.counts.num_loads
        outputs(model, num=2)
        assert cache.counts.num_loads == num_loads


@KINDS
def test_the_memory_is_what_the_bill_says(make: type) -> None:
    budget = budget_for(make, 3)
    model = build(mixture(make))
    torch.accelerator.reset_peak_memory_stats()
    handle = streamed(model, budget)
    assert torch.accelerator.max_memory_allocated() == handle.bill.weight_bytes <= budget
    base = torch.accelerator.memory_allocated()
    outputs(model)
    assert torch.accelerator.max_memory_allocated() - base < 60_000, "nothing is allocated for weights"


def test_a_limit_and_none(sim: ModuleType) -> None:
    handle = streamed(build(mixture(FusedExperts)), "10MiB", experts=3 * EXPERT_BYTES)
    assert handle.bill.experts_bytes == 3 * EXPERT_BYTES
    with pytest.raises(offload.BudgetError, match="less than two experts"):
        streamed(build(mixture(FusedExperts)), "10MiB", experts=EXPERT_BYTES)
    with pytest.raises(offload.BudgetError, match="two experts"):
        streamed(build(mixture(FusedExperts)), budget_for(FusedExperts, 2) - 4 * 512 - 2 * EXPERT_BYTES)
    model = build(mixture(FusedExperts))
    handle = streamed(model, "70KiB", experts=None)
    assert handle.expert_cache is None
    assert_same_bits(outputs(model), expected(mixture(FusedExperts)))


@KINDS
def test_weights_on_disk_and_pinning_refused(make: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(mixture(make))
    handle = streamed(model, budget_for(make, 3), disk=tmp_path)
    assert_same_bits(outputs(model), expected(mixture(make)))
    handle.remove()

    def refuse(self: Any, num_bytes: int) -> Tensor:
        raise RuntimeError("memlock")

    budget = budget_for(make, 3)
    monkeypatch.setattr(offload.accelerators.Accelerator, "pinned_empty", refuse)
    model = build(mixture(make))
    streamed(model, budget)
    assert_same_bits(outputs(model), expected(mixture(make)))


@KINDS
def test_changed_weights_are_seen_and_state_is_whole(make: type) -> None:
    model, other = build(mixture(make)), build(mixture(make), seed=1)
    streamed(model, budget_for(make, 8))
    outputs(model, num=1)
    assert_same_bits(snapshot(model), snapshot(build(mixture(make))))
    model.load_state_dict(other.state_dict())
    assert_same_bits(outputs(model), outputs(other, "cpu"))


class Adapted(Model):
    """A trained layer below frozen blocks, so that backward goes through all experts; perhaps recomputed."""

    recomputed = False

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__(NUM_BLOCKS, lambda i: Mixture(make))
        self.layers.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recomputed else layer(x)
        return self.head(x)


class Recomputed(Adapted):
    recomputed = True


@pytest.mark.parametrize(
    ("make", "model_class", "resident"),
    [
        (FusedExperts, Adapted, "auto"),
        (FusedExperts, Recomputed, 0),
        (SeparateExperts, Recomputed, "auto"),
        (SeparateExperts, Adapted, 0),
    ],
)
def test_gradients_through_frozen_experts(make: type, model_class: type, resident: Any) -> None:
    model = build(lambda: model_class(make))
    streamed(model, budget_for(make, 3), resident=resident)
    loss_of(model, 0).backward()
    assert_same_bits(gradients(model), reference_gradients(lambda: model_class(make)))


@KINDS
def test_experts_that_are_trained(make: type) -> None:
    """Separate ones as blocks are; fused ones with their block."""

    def trained() -> nn.Module:
        return Model(NUM_BLOCKS, lambda i: Mixture(make)).requires_grad_(True)

    model = build(trained)
    handle = streamed(model, "90KiB", resident=0)
    assert (handle.expert_cache is None) == (make is FusedExperts)
    loss_of(model, 0).backward()
    assert_same_bits(gradients(model), reference_gradients(trained))


def test_fused_experts_unfrozen_later_are_refused() -> None:
    model = build(mixture(FusedExperts))
    streamed(model, "10MiB")
    model.requires_grad_(True)
    with pytest.raises(RuntimeError, match="are trained now"):
        loss_of(model, 0)


@pytest.mark.parametrize(("make", "error"), [(FusedExperts, KeyboardInterrupt), (SeparateExperts, ValueError)])
def test_an_exception_in_the_middle_of_an_expert_and_a_retry(
    make: type, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(mixture(make))
    streamed(model, budget_for(make, 3))
    num_calls = 0
    real = torch.tanh

    def tanh(x: Tensor) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 5:
            raise error
        return real(x)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "tanh", tanh)
        with pytest.raises(error):
            outputs(model)
    assert_same_bits(outputs(model), expected(mixture(make)))


class AllAtOnce(FusedExperts):
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return torch.bmm(hidden_states.expand(NUM_EXPERTS, -1, -1), self.up).sum(0)


class Gathers(FusedExperts):
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return self.up[top_k_index.flatten()].sum(0) + hidden_states


class Keeps(FusedExperts):
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        first, second = self.up[0], self.up[1]
        return hidden_states @ first @ second


class Writes(FusedExperts):
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return hidden_states @ self.up[0].mul_(2)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (AllAtOnce, TypeError, "several experts at once"),
        (Gathers, TypeError, "several experts at once"),
        (Keeps, RuntimeError, "still holds weights of expert 0"),
        (Writes, RuntimeError, r"changed its weight up\[0\] in place"),
    ],
)
def test_what_is_refused(make: type, error: type[Exception], message: str) -> None:
    model = build(mixture(make))
    streamed(model, "10MiB")
    with pytest.raises(error, match=message):
        outputs(model)


def test_a_mixtral_of_transformers(sim: ModuleType) -> None:
    transformers = pytest.importorskip("transformers")
    ids = torch.arange(1, 9)[None]

    def mixtral() -> Any:
        torch.manual_seed(0)
        config = transformers.MixtralConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=3, experts_implementation="eager",
        )  # fmt: skip
        return transformers.MixtralForCausalLM(config).requires_grad_(False).eval()

    def generated(model: Any) -> Tensor:
        return model.generate(ids.to("sim"), max_new_tokens=4, do_sample=False, pad_token_id=0).cpu()

    want = generated(mixtral().to("sim"))
    model = mixtral()
    handle = streamed(model, "170KiB", resident=0)
    assert torch.equal(generated(model), want)
    counts = handle.expert_cache.counts
    assert 0 < counts.num_loads < counts.num_visits


# ---- the cache without tensors

UNIT = ALIGN_BYTES


def sizes_cache(num_experts: int, num_places: int, lanes: Any) -> ExpertCache:
    source = SizesOnly([UNIT] * num_experts, lanes, UNIT)
    return ExpertCache(dict.fromkeys(range(num_experts), UNIT), source, lanes, begin=0, num_bytes=num_places * UNIT)


def visit(cache: ExpertCache, lanes: Any, expert: int) -> None:
    from offload.lanes import Work

    offset = cache.enter(expert)
    lanes.compute.submit(Work(f"expert {expert}", reads=arena_cells(offset, UNIT, UNIT)))
    cache.leave(expert)


def test_the_waits_suffice() -> None:
    history = AccessHistory()
    lanes = ordering_lanes(history)
    cache = sizes_cache(7, 3, lanes)
    for shift in range(6):
        cache.begin_pass()
        routed = sorted({(shift + i * i) % 7 for i in range(4)})
        cache.route(routed)
        for expert in routed:
            visit(cache, lanes, expert)
    assert history.hazards == []


def test_a_cycle_that_does_not_fit_keeps_a_part_of_it() -> None:
    """Where all are equally cold, the least recently used one would be exactly the one that is needed next."""
    lanes = ordering_lanes(AccessHistory())
    cache = sizes_cache(8, 4, lanes)
    for _ in range(10):
        cache.begin_pass()
        for expert in range(8):
            visit(cache, lanes, expert)
    assert cache.counts.num_loads == 48, "of 80 visits: nearly half of them find theirs"


def test_hot_experts_stay_and_cool_down() -> None:
    lanes = ordering_lanes(AccessHistory())
    cache = sizes_cache(6, 3, lanes)
    for step in range(100):
        cache.begin_pass()
        for expert in (0, 1, 2 + step % 4):
            visit(cache, lanes, expert)
    assert {0, 1} <= {*cache.held()}
    assert cache.counts.num_loads == 2 + 100 + 1, "and one: after the first pass all three are equally hot"
    for _ in range(3 * HALF_LIFE_PASSES // 2):
        cache.begin_pass()
        for expert in (4, 5):
            visit(cache, lanes, expert)
    assert {4, 5} <= {*cache.held()}
    loads = cache.counts.num_loads
    cache.begin_pass()
    for expert in (4, 5):
        visit(cache, lanes, expert)
    assert cache.counts.num_loads == loads


def test_frequencies_keep_their_order_for_ever() -> None:
    from offload.streaming.expert_cache import Frequencies

    frequencies = Frequencies()
    for step in range(20_000):
        frequencies.note(step % 3)
        frequencies.note(3)
        frequencies.end_pass()
    scores = [frequencies.of(expert) for expert in range(4)]
    assert max(scores) == scores[3] < float("inf")
    assert all(0 < score < scores[3] for score in scores[:3])
