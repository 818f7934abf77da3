"""Interleaved, exact optimizer offloading for DeepSpeed ZeRO: stages 1, 2 and 3, without a fork.

::

    from offload.integrations.deepspeed import initialize   # takes and returns what deepspeed.initialize does

    engine, *_ = initialize(model=model, config="ds_config.json", model_parameters=model.parameters())

with a block ``"interleaved_offload": {}`` in the configuration. docs/deepspeed.md has its keys.
"""

from .config import ConfigError, Settings
from .entry import Installed, initialize, install
from .seams import SeamError

__all__ = ["ConfigError", "Installed", "SeamError", "Settings", "initialize", "install"]
