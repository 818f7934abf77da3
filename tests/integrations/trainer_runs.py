"""Trainings with transformers' Trainer, and the plain loop that they must equal bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from offload.integrations.transformers import offloaded
from tests.training import snapshot

NUM_STEPS, SEQ_LEN, VOCABULARY = 6, 12, 64
LR, CLIP, DECAY = 1e-2, 0.5, 0.1


def llama(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """Every parameter's numel is a multiple of 16: see tests/test_bits.py."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=VOCABULARY, use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(device, dtype)


def sequences(num: int) -> list[dict[str, Tensor]]:
    ids = torch.randint(3, VOCABULARY, (num, SEQ_LEN), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


class Result(NamedTuple):
    losses: list[Tensor]
    params: dict[str, Tensor]


def arguments(folder: Path, *, accumulation: int = 1, **others: Any) -> transformers.TrainingArguments:
    given = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation, "max_steps": NUM_STEPS,
        "learning_rate": LR, "weight_decay": DECAY, "max_grad_norm": CLIP, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False, **others,
    }  # fmt: skip
    return transformers.TrainingArguments(output_dir=str(folder), **given)


def record_losses(model: nn.Module) -> list[Tensor]:
    losses: list[Tensor] = []

    def record(module: nn.Module, args: Any, output: Any) -> None:
        if module.training:
            losses.append(output.loss.detach().cpu())

    model.register_forward_hook(record)
    return losses


def rows_of(args: transformers.TrainingArguments) -> list[dict[str, Tensor]]:
    return sequences(args.max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps)


def trainer_of(model: Any, args: transformers.TrainingArguments, **others: Any) -> transformers.Trainer:
    """A stock Trainer but for the optimizer, which ``others`` may name too."""
    given = {"optimizer_cls_and_kwargs": offloaded(args, subgroup_numel=4096), "train_dataset": rows_of(args), **others}
    return transformers.Trainer(model=model, args=args, **given)


def train_with_trainer(trainer: transformers.Trainer, **train_arguments: Any) -> Result:
    losses = record_losses(trainer.model)
    trainer.train(**train_arguments)
    return Result(losses, snapshot(trainer.model))


def plain_loop(
    model: Any,
    args: transformers.TrainingArguments,
    optimizer_of: Callable[[Any], torch.optim.Optimizer],
    data: list[dict[str, Tensor]] | None = None,
) -> Result:
    """What Trainer does with these arguments, written out: no weight decay for norms, a linear schedule.

    Clips by torch's function: the last bits of a norm depend on the order of the gradients, and Trainer's is the
    model's, the optimizer's that of its groups.
    """
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    others = [p for name, p in model.named_parameters() if "norm" not in name]
    optimizer = optimizer_of([{"params": others, "weight_decay": DECAY}, {"params": norms, "weight_decay": 0.0}])
    schedule = transformers.get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=args.max_steps)
    size, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    rows = torch.stack([row["input_ids"] for row in data or rows_of(args)])
    num_targets = torch.tensor(accumulation * size * (rows.shape[1] - 1))  # nothing predicts the first token
    losses = record_losses(model.train())
    for micro_batches in rows.view(args.max_steps, accumulation, size, -1).to(model.device):
        for ids in micro_batches:
            model(input_ids=ids, labels=ids, num_items_in_batch=num_targets).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return Result(losses, snapshot(model))
