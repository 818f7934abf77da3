"""Plan a training job on a machine you need not own: memory, predicted step, plan, alternatives, what would help."""

from __future__ import annotations

import argparse
import json

from offload._table import format_table
from offload.cli.options import add_hardware, add_output, model_cost
from offload.hardware import HardwareProfile
from offload.homes import DEFAULT_NUM_SLOTS
from offload.jobs import JobPlan, TrainingJob, plan_job
from offload.kernels import STATE_FORMATS
from offload.overlaps import describe
from offload.plan import Placement
from offload.pool import Budgets, format_bytes, parse_bytes
from offload.timeline import draw, write_chrome_trace

MIN_GAIN = 0.01  # of a lever that is listed
GRAD_ITEMSIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
_MAX_WORDS = 24  # of the plan's text that are printed; --json has all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    help_model = "a shape (llama-7b, config.json, num_layers=32,hidden=...) or package.module:function"
    parser.add_argument("--model", required=True, metavar="MODULE_OR_SHAPE", help=help_model)
    add_hardware(parser)
    parser.add_argument("--ranks", type=int, default=1, help="data-parallel ranks in all (default 1)")
    parser.add_argument("--zero-stage", type=int, default=3, help="what ZeRO shards over the ranks (default 3)")
    parser.add_argument("--micro-batch", type=int, default=1, help="sequences of one rank and step (default 1)")
    parser.add_argument("--seq", type=int, default=2048, help="tokens of a sequence (default 2048)")
    parser.add_argument("--no-recompute", action="store_true", help="keep all activations (shapes only)")
    parser.add_argument("--state-format", default="fp32", help=f"optimizer state: {', '.join(STATE_FORMATS)}")
    parser.add_argument("--grad-dtype", choices=GRAD_ITEMSIZES, help="of gradients (default: the parameters')")
    parser.add_argument("--no-clipping", action="store_true", help="gradients are not clipped by their global norm")
    parser.add_argument("--subgroup-numel", type=int, help="parameters in a subgroup")
    parser.add_argument("--num-slots", type=int, help="device buffers for visiting states")
    for kind in ("device", "host", "pinned"):
        parser.add_argument(f"--{kind}-budget", metavar="BYTES", help=f"{kind} memory of the optimizer, as 40GiB")
    add_output(parser)


def run(options: argparse.Namespace) -> None:
    profile = HardwareProfile.load(options.hardware)
    budgets = Budgets(
        device_bytes=parse_bytes(_number(options.device_budget), "--device-budget"),
        host_bytes=parse_bytes(_number(options.host_budget), "--host-budget"),
        pinned_bytes=parse_bytes(_number(options.pinned_budget), "--pinned-budget"),
    )
    cost = model_cost(
        options.model, micro_batch=options.micro_batch, seq=options.seq, recompute=not options.no_recompute
    )
    job = TrainingJob(
        cost,
        profile,
        options.ranks,
        options.zero_stage,
        options.subgroup_numel,
        options.state_format,
        grad_itemsize=GRAD_ITEMSIZES.get(options.grad_dtype),
        clips=not options.no_clipping,
    )
    found = plan_job(job, budgets, num_slots=options.num_slots)
    if options.trace:
        write_chrome_trace(options.trace, found.step.spans)
    if options.plot:
        choices = (found.choice, *found.decision.runners_up[:1])
        updates = [(f"update, {choice.name}", choice.prediction.spans) for choice in choices]
        draw([("the whole step", found.step.spans), *updates], options.plot)
    print(json.dumps(found.as_dict(), indent=1) if options.json else report(found, options.hardware))


def _number(text: str | None) -> str | int | None:
    return int(text) if text is not None and text.isdecimal() else text


def report(found: JobPlan, hardware: str) -> str:
    """The plan for a reader. ``hardware`` is the profile's name or file."""
    job, decision, step, best = found.job, found.decision, found.step, found.choice
    words = str(best.plan).split()
    text = " ".join(words[:_MAX_WORDS]) + (f" ... ({len(words)} operations in all)" if len(words) > _MAX_WORDS else "")
    plans = [("plan", "update s", "against best")]
    for ranked in decision.ranking:
        about = "" if ranked.is_exact else "~"
        plans.append((ranked.name, f"{about}{ranked.update_s:.4g}", f"{ranked.update_s / best.update_s:.2f}x"))
    ways = [("how the update hides", "plan", "step s", "update exposed s", "against best")]
    for hidden in found.hidden:
        about, against = "" if hidden.is_exact else "~", f"{hidden.step_s / step.step_s:.2f}x"
        seconds = (f"{about}{hidden.step_s:.4g}", f"{about}{hidden.update_s:.4g}")
        ways.append((describe(hidden.hiding), hidden.plan_name, *seconds, against))
    levers = [("what would help most", "update s", "faster")]
    levers += [
        (lever.name, f"{lever.update_s:.4g}", f"{best.update_s / lever.update_s:.2f}x")
        for lever in found.levers
        if lever.update_s < (1 - MIN_GAIN) * best.update_s
    ]
    bounds = ", ".join(f"{resource} {seconds:.4g}" for resource, seconds in best.bound.seconds_of.items())
    refused = [f"  {name}: {reason}" for name, reason in decision.refused.items()]
    return "\n".join(
        [
            f"{job.cost.name}: {job.cost.numel:,} parameters, {job.rank_numel:,} updated by each of {job.num_ranks} "
            f"ranks on {job.profile.name} ({job.profile.description})",
            *([f"WARNING: {found.warning}"] if found.warning else []),
            str(found.memory),
            f"budget of the optimizer: device {format_bytes(found.budgets.device_bytes or 0)}",
            f"predicted step {step.step_s:.4g} s: forward {step.forward_s:.4g}, backward {step.backward_s:.4g}, "
            f"update {step.update_s:.4g} beside them ({best.update_s:.4g} from idle lanes to the last write-back)",
            f"hidden: {describe(found.hidden[0].hiding)} (overlap={found.hidden[0].hiding.overlap!r})",
            f"plan: {best.name}; {best.bound.binds} binds (seconds each resource needs at least: {bounds})",
            f"  {text}",
            f"to run it: {how_to_run(found, hardware)}",
            format_table(ways),
            format_table(plans),
            *(["refused by the budgets:", *refused] if refused else []),
            format_table(levers) if len(levers) > 1 else f"no lever gains {MIN_GAIN:.0%}: {best.bound.binds} binds",
        ]
    )


def how_to_run(found: JobPlan, hardware: str) -> str:
    """What to write in a program so that it runs as planned; plan="auto" begins about so, measures and corrects itself.

    For several ranks under ZeRO, the block of a DeepSpeed configuration, which has fp32 state, no slots in freed
    activations, no early gradients and no updates in backward.
    """
    job, hiding, plan, bill = found.job, found.hidden[0].hiding, found.choice.plan, found.memory.bill
    num_slots = plan.num_buffers(Placement.DEVICE) - hiding.num_passing_slots
    kinds = set(plan.placements.values())
    arguments: dict[str, object] = {}
    if kinds == {Placement.HOST}:
        arguments["plan"] = "host"
    elif kinds == {Placement.DEVICE}:
        arguments["plan"] = "device"
    elif bill.resident_bytes:  # beside which "auto" keeps two slots free
        needed = bill.resident_bytes + 2 * max(s.state_bytes for s in job.subgroups())
        arguments["device_budget"] = min(needed, found.budgets.device_bytes or needed)
    if num_slots > DEFAULT_NUM_SLOTS and not bill.resident_bytes:
        arguments["num_slots"] = num_slots
    if hiding.overlap == "backward":
        arguments["overlap"] = "backward"
    if job.num_ranks > 1 and job.zero_stage:
        lacks = " (updates after backward)" if hiding.in_backward else ""
        without = [
            ("slots in freed activations", hiding.num_passing_slots),
            ("early gradients", hiding.early_gradients),
        ]
        missing = " and ".join(what for what, is_asked in without if is_asked)
        lacks = lacks or (f" (without {missing})" if missing else "")
        return f'"interleaved_offload": {json.dumps(arguments)}{lacks}'
    if hiding.early_gradients:
        arguments["early_gradients"] = True
    if hiding.num_passing_slots:
        arguments["num_passing_slots"] = hiding.num_passing_slots
    if job.state_format != "fp32":
        arguments["state_format"] = job.state_format
    if "plan" not in arguments:
        arguments["profile"] = hardware
    written = [f"{name}={value!r}" for name, value in arguments.items()]
    written += ["memory_monitor=monitor"] if hiding.num_passing_slots else []
    call = f"offload.AdamW({', '.join(['model.parameters()', *written])})"
    return f"{call}, and each backward in optimizer.update_in_backward()" if hiding.in_backward else call
