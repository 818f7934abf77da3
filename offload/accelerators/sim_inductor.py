"""Why inductor does not serve the emulated device, said where inductor asks for a device's parts.

Without these it would fail too, but with an assertion or a KeyError of its own. CPU tensors are compiled as ever.
"""

from __future__ import annotations

from typing import NoReturn


def _refuse(*args: object) -> NoReturn:
    raise NotImplementedError(
        "inductor's C++ kernels follow the pointers of their tensors, and those of the emulated device lead nowhere on "
        "the host: compile with backend='aot_eager', or compile the model on the CPU"
    )


class Scheduling:
    """What inductor would make to generate kernels."""

    def __init__(self, *args: object) -> None:
        _refuse()


def wrapper_codegen(_device_module: object) -> type:
    """What inductor would make to generate the code around kernels; imported late, since inductor takes seconds."""
    from torch._inductor.codegen.common import DeviceOpOverrides, register_device_op_overrides
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen

    register_device_op_overrides("sim", DeviceOpOverrides())  # or inductor fails before it asks for code
    return type("SimWrapperCodegen", (PythonWrapperCodegen,), {"create": staticmethod(_refuse)})
