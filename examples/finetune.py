"""Fine-tune a language model on a text, with the optimizer's states in host memory.

Run by ``make demo`` on SmolLM2-135M-Instruct and the King James Bible (examples/fetch_demo_assets.py); ``--model`` and
``--text`` take your own. The training loop is an ordinary one: what is special is the line that makes the optimizer.

Trains twice from the same weights over the same batches: as ``--plan`` says, and with every update on the CPU. Both
must give the same bits, so losses and weights are compared for equality, and the times beside each other.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import offload
from offload.monitor import MemorySample, Phase
from offload.timeline import Span, describe, draw, write_chrome_trace

ASSETS = Path(__file__).resolve().parent.parent / ".cache" / "demo"
DRAWN_STEPS = 2  # how many of the last steps the memory panel shows

# The emulated accelerator: the rates of a real card, but little memory, too little for torch's own AdamW.
EMULATED_PROFILE, EMULATED_CAPACITY = "rtx4090-desktop", "2304MiB"
EMULATED_NOTICE = f"""\
Training runs on the EMULATED accelerator, a PyTorch device with memory ({EMULATED_CAPACITY}), streams, links.
It is built on first use, in about a minute, and its numbers are computed on this CPU. Times of phases are SIMULATED,
by the profile {EMULATED_PROFILE!r}; only the updates on the CPU are measured."""


@dataclass(frozen=True, slots=True)
class Run:
    """What one training run left behind. Weights are copies on the CPU."""

    losses: list[float]
    weights: dict[str, Tensor]
    update_s: list[float]
    spans: list[Span]
    samples: list[MemorySample]
    report: str


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ASSETS / "SmolLM2-135M-Instruct", help="transformers folder")
    parser.add_argument("--text", type=Path, default=ASSETS / "king-james.txt", help="plain text, UTF-8")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seq-len", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences per step")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--device", choices=["auto", "cuda", "sim", "cpu"], default="auto", help="sim is emulated")
    parser.add_argument("--plan", type=parse_plan, default="auto", help="auto, host, device, stride:2, resident:0.2 …")
    parser.add_argument("--device-budget", default="700MiB", help="device memory for optimizer states, as 4GiB")
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder for the picture and the trace")
    arguments = parser.parse_args()
    if arguments.steps < 4:
        parser.error(f"--steps must be at least 4, got {arguments.steps}: two to measure the machine, two to use it")
    for path in (arguments.model, arguments.text):
        if not path.exists():
            parser.error(f"{path} does not exist; `make demo` fetches a model and a text")
    return arguments


def parse_plan(text: str) -> str | offload.Plan | offload.Static | offload.Stride:
    kind, _, number = text.partition(":")
    if kind == "stride":
        return offload.Stride(int(number))
    if kind == "resident":
        return offload.Static(resident_fraction=float(number))
    return text if text in ("auto", "host", "device") else offload.Plan.parse(text)


def choose_device(name: str) -> torch.device:
    """The device called ``name``; the emulated one is built and registered only if it is what will be used."""
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        name = "sim" if found is None else found.type
    if name == "sim":
        start_emulation()
    return torch.device(name)


def start_emulation() -> None:
    from offload.testing import sim

    print(EMULATED_NOTICE)
    sim.load()
    sim.configure(capacity=EMULATED_CAPACITY, poison=False)
    profile = offload.HardwareProfile.load(EMULATED_PROFILE)
    sim.set_profile(
        h2d_bytes_per_s=profile.h2d_bytes_per_s,
        d2h_bytes_per_s=profile.d2h_bytes_per_s,
        memory_bytes_per_s=profile.device_memory_bytes_per_s,
        flops=profile.device_flops,
        latency_s=profile.copy_latency_s,
        launch_s=profile.launch_latency_s,
    )


def clock_of(device: torch.device) -> Callable[[], float]:
    """What phases are timed with, in seconds: for the emulated device its own clock."""
    if device.type == "sim":
        from offload.testing import sim

        return sim.host_time_s
    return time.perf_counter


def load_model(folder: Path, device: torch.device) -> nn.Module:
    # Matrix products in bf16 are slow on CPUs, where the emulated accelerator computes.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_cache=False)
    return model.to(device).train()


def load_batches(folder: Path, text: Path, num_batches: int, batch_size: int, seq_len: int) -> Tensor:
    """Successive token ids of the text: (num_batches, batch_size, seq_len), int64."""
    needed = num_batches * batch_size * seq_len
    # Hardly any text needs 16 characters a token, and tokenizing all of a long one would take longer than training.
    characters = text.read_text(encoding="utf-8")[: 16 * needed]
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(characters)["input_ids"])
    if ids.numel() < needed:
        raise SystemExit(f"{text} has {ids.numel()} tokens and {needed} are needed; lower --steps or --seq-len")
    return ids[:needed].view(num_batches, batch_size, seq_len)


def wait_for_compute(device: torch.device) -> None:
    """So that each phase is charged its own time. Copies of states on other streams go on."""
    if device.type != "cpu":
        torch.accelerator.current_stream().synchronize()


def train(arguments: argparse.Namespace, device: torch.device, batches: Tensor, plan: object, title: str) -> Run:
    """Train on all but the last of ``batches``, which is held out; the loss on it is printed before and after."""
    model = load_model(arguments.model, device)
    optimizer = offload.AdamW(
        model.parameters(),
        lr=arguments.lr,
        weight_decay=0.01,
        plan=plan,
        device_budget=arguments.device_budget,
        overlap="none",  # so that the update can be timed by itself; by default it hides under the next forward
    )
    print(f"\n=== Plan: {title}\n{optimizer.bill if plan == 'host' else optimizer.explain()}")
    clock = clock_of(device)
    monitor = offload.MemoryMonitor(device, clock=clock)
    *training, held_out = batches.to(device)
    before = held_out_loss(model, held_out)

    losses, update_s = [], []
    progress = tqdm(training, desc=f"plan {title}", unit="step", dynamic_ncols=True)
    for step, batch in enumerate(progress):
        start_s = time.perf_counter()
        with monitor.phase(Phase.FORWARD):
            loss = model(input_ids=batch, labels=batch).loss
            wait_for_compute(device)
        with monitor.phase(Phase.BACKWARD):
            loss.backward()
            wait_for_compute(device)
        with monitor.phase(Phase.UPDATE):
            update_start_s = clock()
            if step == len(training) - 1:
                optimizer.time_next_step()  # for the timeline; it waits for all copies, so its time doesn't count
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            wait_for_compute(device)
            update_s.append(clock() - update_start_s)
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        tokens_per_s = batch.numel() / (time.perf_counter() - start_s)
        progress.set_postfix(loss=f"{losses[-1]:.4f}", tokens_per_s=f"{tokens_per_s:.0f}")

    optimizer.synchronize()
    print(f"loss on a held-out passage: {before:.4f} before, {held_out_loss(model, held_out):.4f} after")
    weights = {name: param.detach().to("cpu", copy=True) for name, param in model.named_parameters()}
    report = f"{optimizer.explain()}\n\n{monitor.report()}"
    return Run(losses, weights, update_s, optimizer.timeline(), monitor.samples, report)


@torch.no_grad()
def held_out_loss(model: nn.Module, batch: Tensor) -> float:
    return float(model(input_ids=batch, labels=batch).loss)


def compare(planned: Run, all_host: Run) -> bool:
    """Print whether both runs agree bit for bit, and their times; True if they do."""
    same_losses = planned.losses == all_host.losses
    differing = [name for name in planned.weights if not torch.equal(planned.weights[name], all_host.weights[name])]
    num_weights, num_steps = len(planned.weights), len(planned.losses)
    planned_s, all_host_s = (statistics.median(run.update_s[2:-1]) for run in (planned, all_host))
    print(f"\n=== Compared with every update on the CPU, after {num_steps} steps")
    print(f"losses:  {'bit-identical' if same_losses else 'DIFFERENT'}")
    print(f"weights: {num_weights - len(differing)} of {num_weights} tensors bit-identical", *differing[:5])
    print(f"update:  {planned_s:.3f} s a step against {all_host_s:.3f} s (median of steps 3 to {num_steps - 1})")
    return same_losses and not differing


def save_pictures(planned: Run, all_host: Run, output: Path, *, emulated: bool) -> None:
    output.mkdir(parents=True, exist_ok=True)
    last = [sample for sample in planned.samples if sample.step > planned.samples[-1].step - DRAWN_STEPS]
    note = f" (simulated {EMULATED_PROFILE}, measured CPU)" if emulated else ""
    panels = [(f"as planned{note}", planned.spans), (f"every update on the CPU{note}", all_host.spans)]
    draw(panels, output / "step_timeline.png", memory=last)
    write_chrome_trace(output / "step_trace.json", planned.spans)
    print(f"\nupdate phase of the last step, as planned:\n{describe(planned.spans)}")
    print(f"\npicture: {output / 'step_timeline.png'}")
    print(f"trace:   {output / 'step_trace.json'} (open it in https://ui.perfetto.dev)")


def main() -> None:
    arguments = parse_arguments()
    disable_progress_bar()
    device = choose_device(arguments.device)
    num_batches = arguments.steps + 1  # the last one is held out
    batches = load_batches(arguments.model, arguments.text, num_batches, arguments.batch_size, arguments.seq_len)

    planned = train(arguments, device, batches, arguments.plan, str(arguments.plan))
    print(f"\n{planned.report}")
    all_host = train(arguments, device, batches, "host", "host")
    same = compare(planned, all_host)
    save_pictures(planned, all_host, arguments.output, emulated=device.type == "sim")
    if not same:
        raise SystemExit("the two runs differ: where a subgroup is updated must not change the result")


if __name__ == "__main__":
    main()
