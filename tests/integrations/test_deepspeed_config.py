"""The configuration block: what is read, what is translated, and what is refused with a remedy."""

from __future__ import annotations

import base64
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("deepspeed")

from offload.integrations.deepspeed.config import ConfigError, Settings, SplitConfig, split_config
from offload.policy import Static, Stride


def split(
    block: Any = None, *, stage: int = 3, offload: dict[str, Any] | None = None, zero: Any = None, **top: Any
) -> SplitConfig:
    offload_optimizer = {"device": "cpu", **(offload or {})}
    zero_optimization = {"stage": stage, "offload_optimizer": offload_optimizer, **(zero or {})}
    return split_config({"zero_optimization": zero_optimization, "interleaved_offload": block or {}, **top})


def settings(block: Any = None, **rest: Any) -> Settings:
    found = split(block, **rest).settings
    assert found is not None
    return found


def test_without_the_block_nothing_is_touched() -> None:
    config = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}
    assert split_config(config) == SplitConfig(None, config)


def test_deepspeed_sees_neither_the_block_nor_an_offloaded_optimizer() -> None:
    config = {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "overlap_comm": True},
        "interleaved_offload": {}, "gradient_clipping": 1.0,
    }  # fmt: skip
    before = json.dumps(config)
    found = split_config(config)
    assert found.deepspeed == {
        "zero_optimization": {"stage": 2, "overlap_comm": True}, "gradient_clipping": 1.0,
    }  # fmt: skip
    assert json.dumps(config) == before


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"train_batch_size": 8}', encoding="utf-8")
    assert split_config(path).deepspeed == split_config(str(path)).deepspeed == {"train_batch_size": 8}
    with pytest.raises(TypeError, match="dict or the path"):
        split_config(3)


def test_a_file_may_have_comments_and_the_text_may_be_in_base64(tmp_path: Path) -> None:
    """As DeepSpeed reads them, with or without our block."""
    path = tmp_path / "ds.json"
    path.write_text('{"train_batch_size": 8 # a comment\n}', encoding="utf-8")
    encoded = base64.urlsafe_b64encode(b'{"train_batch_size": 8}').decode()
    assert split_config(path).deepspeed == split_config(encoded).deepspeed == {"train_batch_size": 8}
    path.write_text('{"train_batch_size": 8, "train_batch_size": 9}', encoding="utf-8")
    with pytest.raises(ValueError, match="Duplicate keys"):
        split_config(path)
    with pytest.raises(ConfigError, match="neither the path"):
        split_config("nowhere.json")


def test_deprecated_keys_are_read_as_deepspeed_reads_them() -> None:
    config = {"zero_optimization": {"stage": 2, "cpu_offload": True}, "interleaved_offload": {}}
    found = split_config(config)
    assert found.settings == Settings()
    assert found.deepspeed == {"zero_optimization": {"stage": 2}}
    with pytest.raises(ConfigError, match="offload_param"):
        split(zero={"cpu_offload_param": True})


def test_the_keys_become_options() -> None:
    assert settings() == Settings()
    options = settings({"num_slots": 3, "device_budget": "1GiB", "pinned_budget": 5}).options()
    assert (options.policy, options.num_slots) == ("auto", 3)
    assert (options.budgets.device_bytes, options.budgets.pinned_bytes, options.budgets.host_bytes) == (2**30, 5, None)
    assert settings({"update_stride": 3}).options().policy == Stride(3)
    assert settings({"resident_fraction": 0.25}).options().policy == Static(0.25)
    assert settings({"plan": "host"}).options().num_slots is None


@pytest.mark.parametrize(
    ("offload", "key", "value"),
    [
        ({"ratio": 0.25}, "resident_fraction", 0.75),
        ({"prefetch_optimizer": True, "prefetch_optimizer_gap": 3}, "update_stride", 3),
        ({"prefetch_optimizer": True}, "update_stride", 2),
        ({"prefetch_optimizer": False, "part_grads_async": True}, "plan", "host"),
        ({"pin_memory": False}, "pinned_budget", None),
    ],
)
def test_other_vocabularies_are_translated_with_a_note(
    offload: dict[str, Any], key: str, value: object, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "offload"):
        assert getattr(settings(offload=offload), key) == value
    assert key in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block": {"strides": 2}}, "does not know strides; known are device_budget"),
        ({"block": [2]}, "must be a block"),
        ({"block": {"overlap": "sideways"}}, "overlap='sideways' is not known"),
        (
            {"block": {"overlap": "next_forward"}, "zero": {"zero_quantized_weights": True}},
            "overlap='next_forward' cannot be with zero_quantized_weights",
        ),
        ({"block": {"state_format": "int8"}}, "state_format='int8' is not available"),
        ({"block": {"plan": "host", "update_stride": 2}}, "in 2 ways"),
        ({"block": {"resident_fraction": 0.5}, "stage": 2}, "needs ZeRO stage 3 and this is stage 2"),
        ({"block": {"resident_fraction": 0.5}, "offload": {"ratio": 0.5}}, "same thing twice; remove ratio"),
        ({"offload": {"raito": 0.5}}, "offload_optimizer does not know raito; known are buffer_count"),
        ({"offload": {"ratio": 1.5}}, "ratio=1.5 is the CPU's share"),
        ({"stage": 0}, "stage is 0; set it to 1, 2 or 3"),
        ({"offload": {"device": "nvme"}}, 'device is "nvme"'),
        ({"offload": {"device": "none"}}, "needs zero_optimization.offload_optimizer"),
        ({"offload": {"super_offload": True}}, "super_offload both decide"),
        ({"zero": {"zenflow": {"topk_ratio": 0.1}}}, "zenflow both decide"),
        ({"zero": {"offload_param": {"device": "cpu"}}}, "offload_param.device='cpu' both decide"),
        ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, "bf16_optimizer_states both decide"),
        ({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}, "leave grad_accum_dtype out"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "use bfloat16, or the fp16 block"),
        ({"optimizer": {"type": "Lion"}}, "optimizer.type is 'Lion'"),
        ({"optimizer": {"type": "Adam", "params": {"bias_correction": False}}}, "bias_correction=false"),
    ],
)
def test_what_cannot_be_is_refused_with_a_remedy(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split(**arguments)


def test_zero_without_a_stage_is_refused() -> None:
    with pytest.raises(ConfigError, match="zero_optimization=True has no stage"):
        split_config({"zero_optimization": True, "interleaved_offload": {}})


def test_values_out_of_range_are_refused_by_name() -> None:
    for block, message in (
        ({"update_stride": 0}, "update_stride=0"),
        ({"resident_fraction": 1.5}, "resident_fraction=1.5"),
        ({"num_slots": 0}, "num_slots=0"),
        ({"device_budget": "much"}, "device_budget='much'"),
        ({"plan": "sometimes"}, "plan='sometimes'"),
    ):
        with pytest.raises(ValueError, match=message):
            settings(block).options()


def test_decay_is_that_of_deepspeeds_adam_where_it_is_left_out() -> None:
    params = split(optimizer={"type": "Adam", "params": {"lr": 1e-3}}).deepspeed["optimizer"]["params"]
    assert params == {"lr": 1e-3, "weight_decay": 0.0, "torch_adam": True}
    params = split(optimizer={"type": "AdamW", "params": {"torch_adam": True}}).deepspeed["optimizer"]["params"]
    assert params == {"torch_adam": True}  # torch's own default


def test_deepspeeds_adam_may_be_asked_for() -> None:
    """As DeepSpeed refuses another optimizer then; its own default does not count, since ours has no slow one."""
    from deepspeed.runtime.zero.utils import ZeRORuntimeException

    from offload.integrations.deepspeed import initialize

    model = nn.Linear(2, 2)
    config = {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "zero_force_ds_cpu_optimizer": True,
        "interleaved_offload": {},
    }
    with pytest.raises(ZeRORuntimeException, match="asks for DeepSpeedCPUAdam and the optimizer is AdamW; leave"):
        initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
