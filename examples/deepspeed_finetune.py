"""Fine-tune a language model with DeepSpeed ZeRO, its optimizer states offloaded by the plugin.

::

    python examples/deepspeed_finetune.py                                    # one process: CUDA, or the emulated device
    torchrun --nproc-per-node 2 examples/deepspeed_finetune.py --device cpu  # two ranks over gloo

The block ``"interleaved_offload"`` in deepspeed_finetune.json is the switch: without it (or with ``--deepspeed-only``)
DeepSpeed offloads by itself. Model and text are those of ``make demo``; ``--model`` and ``--text`` take your own.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from finetune import ASSETS, load_batches
from torch import Tensor
from transformers import AutoModelForCausalLM

HERE = Path(__file__).resolve().parent


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "deepspeed_finetune.json", help="DeepSpeed's JSON")
    parser.add_argument("--model", type=Path, default=ASSETS / "SmolLM2-135M-Instruct", help="transformers folder")
    parser.add_argument("--text", type=Path, default=ASSETS / "king-james.txt", help="plain text, UTF-8")
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), help="instead of the configuration's ZeRO stage")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seq-len", type=int, default=64, help="tokens per sequence")
    parser.add_argument("--device", choices=["auto", "cuda", "sim", "cpu"], default="auto", help="sim is emulated")
    parser.add_argument("--deepspeed-only", action="store_true", help="leave the offloading to DeepSpeed")
    arguments = parser.parse_args()
    for path in (arguments.config, arguments.model, arguments.text):
        if not path.exists():
            parser.error(f"{path} does not exist; `make demo` fetches a model and a text")
    return arguments


def choose_accelerator(name: str) -> torch.device:
    """Have DeepSpeed use the device called ``name``; the emulated one is built only if it is what will be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "sim"
    if name == "sim":
        from offload.integrations.deepspeed.emulated import use_emulated_device
        from offload.testing import sim

        print("Training runs on the EMULATED accelerator: what is computed is right, times mean nothing.")
        use_emulated_device()
        sim.configure(capacity="8GiB", poison=False, races=False)
        return torch.device("sim")
    os.environ["DS_ACCELERATOR"] = name
    for key, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(key, value)
    os.environ.setdefault("MASTER_PORT", "29500")
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))  # ranks of DeepSpeed's CPU accelerator
    if name == "cpu":
        leave_collectives_to_gloo()
    return torch.device(name, int(os.environ["LOCAL_RANK"])) if name == "cuda" else torch.device(name)


def leave_collectives_to_gloo() -> None:
    """Otherwise DeepSpeed's CPU accelerator first compiles an extension for them, for minutes."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def load_config(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(arguments.config.read_text(encoding="utf-8"))
    if device.type != "cuda":  # matrix products in bf16 are slow on CPUs, where the emulated accelerator computes too
        config.pop("bf16", None)
    if arguments.stage:
        config["zero_optimization"]["stage"] = arguments.stage
    if arguments.deepspeed_only:
        config.pop("interleaved_offload", None)
    return config


def train(engine: Any, batches: Tensor) -> None:
    for step, batch in enumerate(batches):
        start_s = time.perf_counter()
        loss = engine(input_ids=batch, labels=batch).loss
        engine.backward(loss)
        engine.step()
        if engine.global_rank == 0:
            print(f"step {step}: loss {loss.item():.6f}, {time.perf_counter() - start_s:.2f} s")


def main() -> None:
    arguments = parse_arguments()
    device = choose_accelerator(arguments.device)
    from offload.integrations.deepspeed import initialize  # DeepSpeed looks for its accelerator when it is imported

    torch.manual_seed(0)
    config = load_config(arguments, device)
    dtype = torch.bfloat16 if "bf16" in config else torch.float32
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype, use_cache=False).train()
    engine, *_ = initialize(model=model, model_parameters=model.parameters(), config=config)
    num_batches = arguments.steps * engine.world_size
    batches = load_batches(arguments.model, arguments.text, num_batches, 1, arguments.seq_len).to(device)
    if engine.global_rank == 0 and not arguments.deepspeed_only:
        print(engine.optimizer.offloaded.partition.explain())
    train(engine, batches[engine.global_rank :: engine.world_size])
    engine.destroy()


if __name__ == "__main__":
    main()
