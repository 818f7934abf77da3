"""Fine-tune a language model with transformers' Trainer: a stock script, but for one line and its import.

Without arguments it trains the model and the text of ``make demo`` (examples/fetch_demo_assets.py); ``--tiny`` trains a
small Llama of random weights on its own source text in seconds, and ``--lora`` only adapters of it. On a machine
without an accelerator, ``--emulated`` runs it on the emulated one.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from offload.integrations.transformers import OffloadCallback, offloaded

ASSETS = Path(__file__).resolve().parent.parent / ".cache" / "demo"


def tiny_model(vocab_size: int = 256) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def passages(token_ids: torch.Tensor, seq_len: int) -> list[dict[str, torch.Tensor]]:
    rows = token_ids[: token_ids.numel() // seq_len * seq_len].view(-1, seq_len)
    return [{"input_ids": row, "labels": row} for row in rows]


def load(arguments: argparse.Namespace) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """The model, and the text as passages of ``seq_len`` tokens."""
    if arguments.tiny:
        return tiny_model(), passages(torch.tensor(list(Path(__file__).read_bytes())), arguments.seq_len)
    text = arguments.text.read_text(encoding="utf-8")[: 16 * arguments.steps * arguments.seq_len]
    token_ids = torch.tensor(AutoTokenizer.from_pretrained(arguments.model)(text)["input_ids"])
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, use_cache=False)
    return model, passages(token_ids, arguments.seq_len)


def with_adapters(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ASSETS / "SmolLM2-135M-Instruct", help="transformers folder")
    parser.add_argument("--text", type=Path, default=ASSETS / "king-james.txt", help="plain text, UTF-8")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--emulated", action="store_true")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint in --output")
    parser.add_argument("--output", type=Path, default=Path("out/trainer"))
    arguments = parser.parse_args()
    if arguments.emulated:
        from offload.testing import sim

        sim.load()
        os.environ["ACCELERATE_TORCH_DEVICE"] = "sim"  # Accelerate, and so Trainer, takes any device of torch's by it

    torch.manual_seed(0)
    model, data = load(arguments)
    if arguments.lora:
        model = with_adapters(model)
    args = TrainingArguments(
        output_dir=str(arguments.output), max_steps=arguments.steps, per_device_train_batch_size=1,
        learning_rate=1e-3 if arguments.tiny or arguments.lora else 1e-5, disable_tqdm=True,
        max_grad_norm=1.0, logging_steps=1, save_steps=max(arguments.steps // 2, 1), report_to="none",
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=data,
        optimizer_cls_and_kwargs=offloaded(args, device_budget="700MiB"),  # the one line
        callbacks=[OffloadCallback()],  # only to see inside
    )
    trainer.train(resume_from_checkpoint=arguments.resume or None)
    losses = [f"{logs['loss']:.4f}" for logs in trainer.state.log_history if "loss" in logs]
    print(f"loss: {' '.join(losses)}")
    last = trainer.state.log_history[-1]
    print(", ".join(f"{name} {value:,}" for name, value in last.items() if name.startswith("offload_")))


if __name__ == "__main__":
    main()
