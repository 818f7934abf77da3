"""Lanes: where work runs in order, and the only place where streams, events and workers are touched.

``event = lane.submit(work, after=events)`` is all that the executor knows. There are five lanes: ``compute``,
``update``, ``h2d``, ``d2h`` (accelerator streams) and ``host`` (a worker thread that runs CPU updates). The same
executor runs on

- accelerator lanes (:mod:`offload.lanes.accelerator`): ``torch.Stream`` and ``torch.Event``;
- inline lanes (:mod:`offload.lanes.inline`): everything at once, in order, for parameters on the CPU;
- lazy lanes (:mod:`offload.lanes.lazy`): work is delayed as long as its declared waits allow, in an adversarial order;
- virtual lanes (:mod:`offload.lanes.virtual`): work advances a clock by what it costs;
- ordering lanes (:mod:`offload.lanes.ordering`): nothing runs, conflicting accesses that no wait orders are named.
"""

from offload.lanes.base import Event, Lane, Lanes, Work

__all__ = ["Event", "Lane", "Lanes", "Work"]
