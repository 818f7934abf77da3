"""Layer streaming: run and train models larger than device memory, at the link's speed.

Read :mod:`offload.streaming.engine` first (the loop), then :mod:`offload.streaming.placement` (what stays where) and
:mod:`offload.streaming.streamer` (what happens around a model's calls).
"""

from offload.streaming.attach import stream
from offload.streaming.handle import StreamHandle
from offload.streaming.placement import StreamBill, StreamPlan
from offload.streaming.pretrained import stream_from_pretrained

__all__ = ["StreamBill", "StreamHandle", "StreamPlan", "stream", "stream_from_pretrained"]
