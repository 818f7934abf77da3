"""transformers' Trainer with an offloaded optimizer: the bits of a plain loop, whatever Trainer does in between."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import offload
from offload.accelerators.sim import Executor

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from accelerate import Accelerator
from accelerate.state import AcceleratorState

from offload.integrations.transformers import OffloadCallback, offloaded
from offload.integrations.transformers.optimizer import find_optimizer
from tests.integrations.trainer_runs import (
    CLIP,
    NUM_STEPS,
    Result,
    arguments,
    llama,
    plain_loop,
    sequences,
    train_with_trainer,
    trainer_of,
)
from tests.training import assert_same_bits

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps device and precision of its first use in globals."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


FUSED = {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"lr": 1e-2, "fused": True})}


def ours(groups: Any) -> torch.optim.Optimizer:
    return offload.AdamW(groups, lr=1e-2, subgroup_numel=4096)


def test_trainer_equals_the_plain_loop_and_torch(tmp_path: Path) -> None:
    args = arguments(tmp_path, accumulation=2)
    result = train_with_trainer(trainer_of(llama(), args))
    assert len(result.losses) == NUM_STEPS * 2
    assert_same_bits(result, plain_loop(llama(), args, ours))
    theirs = plain_loop(llama(), args, lambda groups: torch.optim.AdamW(groups, lr=1e-2, fused=True))
    assert_same_bits(result, theirs)


@pytest.mark.slow
def test_bfloat16_weights_with_clipping(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    result = train_with_trainer(trainer_of(llama(torch.bfloat16), args))
    assert_same_bits(result, plain_loop(llama(torch.bfloat16), args, ours))


@pytest.mark.sim(executors=["lazy"])
def test_on_an_accelerator_under_overlap(sim: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "sim")
    args = arguments(tmp_path)
    trainer = trainer_of(llama(), args)
    result = train_with_trainer(trainer)
    optimizer = find_optimizer(trainer.optimizer)
    assert optimizer.runtime.options.overlap == "next_forward"
    assert next(trainer.model.parameters()).device.type == "sim"
    assert_same_bits(result, plain_loop(llama(device="sim"), args, ours))


@pytest.mark.parametrize(
    "executor", ["lazy", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sync", "eager", "random"))]
)
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_trainer_as_it_is_gives_no_report(
    sim: ModuleType, dtype: str, executor: Executor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches from pinned memory, recomputation, accumulation, evaluation, checkpoints, torch's fused AdamW."""
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "sim")
    sim.configure(executor, seed=1)
    args = arguments(
        tmp_path, accumulation=2, dataloader_pin_memory=True, gradient_checkpointing=True, eval_strategy="steps",
        eval_steps=2, save_strategy="steps", save_steps=2, optim="adamw_torch_fused", max_steps=3,
    )  # fmt: skip
    trainer = trainer_of(
        llama(getattr(torch, dtype)), args, optimizer_cls_and_kwargs=None, eval_dataset=sequences(4)
    )  # fmt: skip
    assert len(train_with_trainer(trainer).losses) == 3 * 2
    assert next(trainer.model.parameters()).device.type == "sim"
    assert sim.races() == []


@pytest.mark.parametrize(
    "state",
    [
        ("bfloat16", "fp32"),
        *(pytest.param(each, marks=pytest.mark.slow) for each in (("float32", "fp32"), ("bfloat16", "split16"))),
    ],
    ids="-".join,
)
def test_resume_is_bit_identical_with_evaluation_in_between(state: tuple[str, str], tmp_path: Path) -> None:
    dtype, state_format = state

    def trainer(**others: Any) -> transformers.Trainer:
        args = arguments(tmp_path, save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=2, **others)
        optimizer = offloaded(args, subgroup_numel=4096, state_format=state_format)
        return trainer_of(
            llama(getattr(torch, dtype)), args, callbacks=[OffloadCallback()], optimizer_cls_and_kwargs=optimizer,
            eval_dataset=sequences(4),
        )  # fmt: skip

    whole = train_with_trainer(trainer())
    shutil.rmtree(tmp_path / "checkpoint-6")
    resumed = train_with_trainer(trainer(), resume_from_checkpoint=True)
    assert len(resumed.losses) == 3
    assert_same_bits(resumed, Result(whole.losses[3:], whole.params))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast(precision: str, tmp_path: Path) -> None:
    args = arguments(tmp_path, use_cpu=True, **{precision: True})
    results = [train_with_trainer(trainer_of(llama(), args, **others)) for others in ({}, FUSED)]
    assert_same_bits(*results)


def test_lora_trains_adapters_only(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    args = arguments(tmp_path)
    results = []
    for others in ({"optimizer_cls_and_kwargs": offloaded(args)}, FUSED):
        lora = peft.LoraConfig(task_type="CAUSAL_LM", r=16, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
        model = llama()  # seeds the adapters' values too
        trainer = trainer_of(peft.get_peft_model(model, lora), args, **others)
        results.append(train_with_trainer(trainer))
        if others is not FUSED:
            trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
            assert find_optimizer(trainer.optimizer).bill.host_state_bytes == 12 * trainable
    assert_same_bits(*results)


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_accelerate_prepare(precision: str) -> None:
    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[list[torch.Tensor], list[bool]]:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)
        if precision == "fp16":  # without CUDA Accelerate takes none; the first scale is too large
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120)
        model, optimizer = accelerator.prepare(model, optimizer)
        skipped = []
        for row in sequences(8):
            with accelerator.accumulate(model):
                accelerator.backward(model(**{name: ids[None] for name, ids in row.items()}).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                skipped.append(accelerator.optimizer_step_was_skipped)
                optimizer.zero_grad()
        return [param.detach().clone() for param in model.parameters()], skipped

    models = llama(), llama()
    result, skipped = train(models[0], offload.AdamW(models[0].parameters(), lr=1e-2))
    assert any(skipped) == (precision == "fp16")
    # A fused optimizer of torch's skips inside its kernel, so Accelerate does not see it.
    expected, _ = train(models[1], torch.optim.AdamW(models[1].parameters(), lr=1e-2, fused=True))
    assert_same_bits(result, expected)


def test_logs_say_where_states_are_updated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = OffloadCallback()
    trainer = trainer_of(llama(), arguments(tmp_path), callbacks=[callback])
    with caplog.at_level("INFO", logger="offload"):
        train_with_trainer(trainer)
    last_step = trainer.state.log_history[-2]
    assert last_step["offload_num_subgroups"] == len(find_optimizer(trainer.optimizer).runtime.subgroups)
    assert last_step["offload_updates_on_device"] == 0
    assert {"offload_forward_rss_bytes", "offload_backward_rss_bytes", "offload_update_rss_bytes"} <= last_step.keys()
    assert "memory in MiB" in caplog.text
    assert callback.monitor is not None
    num_samples = len(callback.monitor.samples)
    trainer.evaluate(trainer.train_dataset)
    assert len(callback.monitor.samples) == num_samples, "hooks were left behind"


@pytest.mark.slow
@pytest.mark.sim(executors=["sync"])
def test_logs_have_the_device_memory_of_each_phase(
    sim: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "sim")
    trainer = trainer_of(llama(), arguments(tmp_path, max_steps=2), callbacks=[OffloadCallback()])
    train_with_trainer(trainer)
    weights_bytes = sum(param.nbytes for param in trainer.model.parameters())
    logged = trainer.state.log_history[1]
    assert all(logged[f"offload_{phase}_peak_bytes"] >= weights_bytes for phase in ("forward", "backward", "update"))


def test_callback_without_an_offloaded_optimizer_is_an_error(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    trainer = trainer_of(llama(), args, callbacks=[OffloadCallback()], optimizer_cls_and_kwargs=None)
    with pytest.raises(TypeError, match="AdamW, which is not offloaded; give it one by"):
        trainer.train()


def test_arguments_choose_optimizer_and_its_hyper_parameters(tmp_path: Path) -> None:
    args = arguments(tmp_path, adam_beta2=0.95, adam_epsilon=1e-6)
    cls, kwargs = offloaded(args, plan="host", device_budget="1GiB")
    assert cls is offload.AdamW
    assert (kwargs["betas"], kwargs["eps"], kwargs["device_budget"]) == ((0.9, 0.95), 1e-6, "1GiB")
    assert offloaded(arguments(tmp_path, optim="sgd"))[0] is offload.SGD
    with pytest.raises(ValueError, match="optim='adafactor' is not offered here"):
        offloaded(arguments(tmp_path, optim="adafactor"))


ASSETS = Path(__file__).resolve().parents[2] / ".cache" / "demo"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not ASSETS.exists(), reason="needs the model and the text that `make demo` fetches")
def test_smollm2_on_real_text(tmp_path: Path) -> None:
    """SmolLM2-135M on the King James Bible: the plain loop's bits, torch's, and a resumed run's."""
    folder, lr = ASSETS / "SmolLM2-135M-Instruct", 1e-5
    args = arguments(
        tmp_path, max_steps=4, save_strategy="steps", save_steps=2, learning_rate=lr, per_device_train_batch_size=1
    )
    text = (ASSETS / "king-james.txt").read_text(encoding="utf-8")[:4000]
    ids = torch.tensor(transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"])[: 4 * 64].view(4, 64)
    data = [{"input_ids": row, "labels": row} for row in ids]

    def model() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_cache=False)

    def trained(**train_arguments: Any) -> Result:
        trainer = trainer_of(model(), args, train_dataset=data, optimizer_cls_and_kwargs=offloaded(args))
        return train_with_trainer(trainer, **train_arguments)

    result = trained()
    print("loss:", *(f"{loss.item():.6f}" for loss in result.losses))
    for optimizer in (offload.AdamW, torch.optim.AdamW):
        assert_same_bits(plain_loop(model(), args, partial(optimizer, lr=lr, fused=True), data), result)
    resumed = trained(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_bits(resumed, Result(result.losses[2:], result.params))
