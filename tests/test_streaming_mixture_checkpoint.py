"""Checkpoints of transformers' mixtures name each expert's weights: streamed from there, an expert at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
from offload.streaming import conversion
from offload.streaming.checkpoint import map_checkpoint
from offload.streaming.host_memory import RING_LENGTH
from offload.streaming.piecewise import PiecewiseParameter
from tests.test_streaming import limit_host_memory
from tests.training import assert_same_bits

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_torch_thread", "poison")

IDS = torch.arange(1, 13).view(2, 6)
PAGE = 4096
NUM_EXPERTS, TOP_K, NUM_LAYERS = 6, 2, 3
COMMON = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": TOP_K,
}  # fmt: skip


def mixtral() -> Any:
    config = transformers.MixtralConfig(intermediate_size=48, num_local_experts=NUM_EXPERTS, **COMMON)
    return transformers.MixtralForCausalLM(config)


def qwen2_moe() -> Any:
    """With a shared expert, a layer without experts, and an output layer tied to the embedding."""
    config = transformers.Qwen2MoeConfig(
        intermediate_size=64, moe_intermediate_size=40, shared_expert_intermediate_size=56, num_experts=NUM_EXPERTS,
        mlp_only_layers=[1], tie_word_embeddings=True, **COMMON,
    )  # fmt: skip
    return transformers.Qwen2MoeForCausalLM(config)


def qwen3_moe() -> Any:
    config = transformers.Qwen3MoeConfig(moe_intermediate_size=40, num_experts=NUM_EXPERTS, head_dim=8, **COMMON)
    return transformers.Qwen3MoeForCausalLM(config)


def saved(make: Callable[[], Any], folder: Path) -> Path:
    torch.manual_seed(0)
    model = make()
    for name, param in model.named_parameters():
        if "gate.weight" in name:
            nn.init.normal_(param)  # a router that chooses
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="40KB")
    return folder


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS.to("sim")).logits.cpu()


def streamed(folder: Path, budget: int | str = "10MiB", **kwargs: Any) -> tuple[Any, offload.StreamHandle]:
    return offload.stream_from_pretrained(folder, budget, verbose=False, **kwargs)


def loaded(folder: Path, device: str) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    return model.eval().to(device)


@pytest.mark.parametrize("make", [mixtral, qwen2_moe, pytest.param(qwen3_moe, marks=pytest.mark.slow)])
def test_the_same_bits_as_when_it_is_loaded(
    make: Callable[[], Any], poison: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(make, tmp_path)
    assert len([*folder.glob("*.safetensors")]) > 2
    assert any(f"experts.{NUM_EXPERTS - 1}." in name for name in map_checkpoint(folder)), "each expert has its names"
    want, state = logits(loaded(folder, "sim")), loaded(folder, "cpu").state_dict()

    model, handle = streamed(folder, resident=0, experts="30KiB")
    fused = [p for p in model.parameters() if isinstance(p, PiecewiseParameter)]
    assert len(fused) == 2 * (NUM_LAYERS - (make is qwen2_moe))
    assert handle.bill.host_bytes <= RING_LENGTH * (max(handle.plan.block_bytes) + 2 * PAGE), "the ring alone"
    for _ in range(2):
        assert torch.equal(logits(model), want)
    counts = handle.expert_cache.counts
    assert 0 < counts.num_loads <= counts.num_visits
    assert poison[0] > 0, "places were given away"
    assert_same_bits(dict(model.state_dict()), dict(state))
    with monkeypatch.context() as patch:
        limit_host_memory(patch, sum(param.nbytes for param in fused) - 1)
        with pytest.raises(offload.BudgetError, match="experts that files hold apart take"):
            handle.remove()
    assert torch.equal(logits(model), want)
    handle.remove()
    assert not any(isinstance(p, PiecewiseParameter) for p in model.parameters())
    model.set_experts_implementation("eager")
    assert torch.equal(logits(model.to("sim")), want)


def test_only_experts_that_are_routed_to_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from offload.streaming.experts import ExpertSlice

    model, handle = streamed(saved(mixtral, tmp_path))
    for name, param in model.named_parameters():
        if name.endswith("gate.weight"):
            param.data.zero_()  # so that all tokens go the same way
    read = []
    real = ExpertSlice.read_into

    def read_into(self: ExpertSlice, stage: Tensor) -> None:
        read.append(self)
        real(self, stage)

    monkeypatch.setattr(ExpertSlice, "read_into", read_into)
    for _ in range(3):
        logits(model)
    handle.synchronize()
    assert len(read) == len({id(layer) for layer in read}) == NUM_LAYERS * TOP_K
    assert len(handle.expert_cache.held()) == NUM_LAYERS * TOP_K


def test_what_is_saved_while_it_streams(tmp_path: Path) -> None:
    first, second = saved(qwen3_moe, tmp_path / "first"), tmp_path / "second"
    model, _ = streamed(first)
    logits(model)
    model.save_pretrained(second)
    assert_same_bits(dict(map_checkpoint(second)), dict(map_checkpoint(first)))


def test_what_transformers_cuts_stays_mapped(tmp_path: Path) -> None:
    """A checkpoint with queries, keys and values in one tensor, and a model with three."""
    torch.manual_seed(0)
    config = transformers.NomicBertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4
    )
    want = transformers.NomicBertModel(config).eval()
    want.save_pretrained(tmp_path)
    assert any("Wqkv" in name for name in map_checkpoint(tmp_path))
    model, handle = streamed(tmp_path, "100KiB", reserve=0, resident=0)
    assert handle.bill.host_bytes <= RING_LENGTH * (max(handle.plan.block_bytes) + 2 * PAGE), "the ring alone"
    with torch.no_grad():
        got = model(IDS.to("sim")).last_hidden_state.cpu()
        assert torch.equal(got, want.to("sim")(IDS.to("sim")).last_hidden_state.cpu())
    assert [*tmp_path.glob("*.safetensors")] == [tmp_path / "model.safetensors"], "nothing is written"


def test_experts_that_transformers_computes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "_merges_experts", lambda converter: False)
    with pytest.raises(ValueError, match=r"gate_up_proj of \S*experts\.0\.w1\.weight by .* take all experts"):
        streamed(saved(mixtral, tmp_path))


def test_names_are_taken_as_they_are_where_nobody_maps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of models that are not transformers', and by transformers before version 5."""
    tensors, model = {"a": torch.zeros(1)}, mixtral()
    assert conversion.as_named_by(nn.Linear(1, 1), tensors) == tensors
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)
    assert conversion.as_named_by(model, tensors) == tensors


def test_values_that_are_loaded_into_it_are_refused(tmp_path: Path) -> None:
    model, _ = streamed(saved(mixtral, tmp_path))
    want = logits(model)
    state = {name: tensor + 1 for name, tensor in model.state_dict().items() if "experts" in name}
    with pytest.warns(UserWarning, match="no-op"):
        model.load_state_dict(state, strict=False)
    with pytest.raises(RuntimeError, match=r"experts\.gate_up_proj was written to"):
        logits(model)
    assert want.isfinite().all()


def test_adapters_on_it_are_trained(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder = saved(mixtral, tmp_path)

    def gradients(model: Any) -> dict[str, Tensor]:
        torch.manual_seed(1)
        lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(model, lora)
        loss = adapted(IDS.to("sim"), labels=IDS.to("sim")).loss
        loss.backward()
        return {name: p.grad.cpu() for name, p in adapted.named_parameters() if p.grad is not None}

    want = gradients(loaded(folder, "sim"))
    assert_same_bits(gradients(streamed(folder)[0]), want)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"experts": None}, "can only be loaded one by one"),
        ({"blocks": ["lm_head", "model.layers.0"]}, "can only be loaded one by one"),
    ],
)
def test_what_is_refused(kwargs: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        streamed(saved(mixtral, tmp_path), **kwargs)


def test_files_that_do_not_have_the_models_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    saved(mixtral, tmp_path / "whole")
    tensors = map_checkpoint(tmp_path / "whole")

    def remade(**changed: Tensor | None) -> Path:
        folder = tmp_path / f"changed{len([*tmp_path.iterdir()])}"
        folder.mkdir()
        (folder / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
        kept = {name: tensor for name, tensor in (tensors | changed).items() if tensor is not None}
        save_file(kept, folder / "model.safetensors")
        return folder

    names = [f"model.layers.1.block_sparse_moe.experts.{NUM_EXPERTS - 1}.w{i}.weight" for i in (1, 2, 3)]
    with pytest.raises(ValueError, match=r"lacks weights of experts for model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        streamed(remade(**{names[0]: None}))
    with pytest.raises(ValueError, match=r"size mismatch for model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        streamed(remade(**{names[0]: None, names[1]: None, names[2]: None}))
    with pytest.raises(ValueError, match=r"experts \[5\] have"):
        streamed(remade(**{names[1]: torch.zeros(3, 4)}))
    with pytest.raises(ValueError, match=r"1 of the checkpoint are unknown, first \['mtp\.weight'\]"):
        streamed(remade(**{"mtp.weight": torch.zeros(3)}))
    monkeypatch.setattr(transformers.MixtralForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^mtp\."])
    streamed(remade(**{"mtp.weight": torch.zeros(3)}))
