"""How much the microbenchmarks measure."""

from __future__ import annotations

from dataclasses import dataclass, replace

KIB, MIB, GIB = 2**10, 2**20, 2**30


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes and repeats.

    Attributes:
        sizes: bytes of one copy, over which bandwidth is measured.
        repeats: that count; medians are reported.
        copy_bytes: of one copy where copies run beside other work.
        piece_s: least time that work takes which runs beside other work.
        update_numel: parameters of one CPU update.
        matmul_width: of the square bfloat16 matrices.
        num_streams: how many streams copy at once, each a case.
        num_small: copies that one large copy is cut into.
        pin_bytes: of the buffer whose pinning and allocation are timed.
        num_ranks: processes that measure alone and all together; 1 leaves this out.
        step_numel: parameters of the optimizer step whose timeline and shares are measured; 0 for none.
    """

    sizes: tuple[int, ...] = tuple(4 * KIB << i for i in range(19))  # to 1 GiB
    repeats: int = 7
    copy_bytes: int = 64 * MIB
    piece_s: float = 0.05
    update_numel: int = 1 << 24
    matmul_width: int = 2048
    num_streams: tuple[int, ...] = (1, 2, 4)
    num_small: int = 256
    pin_bytes: int = 256 * MIB
    num_ranks: int = 1
    step_numel: int = 1 << 26

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"sizes={self.sizes} are no sizes of copies; give 1 byte or more, at least one")
        for name in ("repeats", "copy_bytes", "update_numel", "matmul_width", "num_small", "pin_bytes", "num_ranks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not possible; give 1 or more")

    @classmethod
    def quick(cls) -> Settings:
        """For a first look: seconds, not minutes."""
        return cls(
            sizes=tuple(4 * KIB << i for i in range(0, 15, 2)),  # to 64 MiB
            repeats=3,
            copy_bytes=8 * MIB,
            piece_s=0.005,
            update_numel=1 << 22,
            matmul_width=512,
            num_small=64,
            pin_bytes=64 * MIB,
            step_numel=1 << 22,
        )

    def within(self, device_free_bytes: int, host_free_bytes: int) -> Settings:
        """With no more than an eighth of what is free on the device and on the host in one buffer.

        Raises:
            ValueError: if not even the smallest copy fits.
        """
        limit = min(device_free_bytes, host_free_bytes) // 8
        sizes = tuple(size for size in self.sizes if size <= limit)
        if not sizes:
            raise ValueError(
                f"copies of {min(self.sizes)} bytes do not fit: {device_free_bytes} bytes are free on the device and "
                f"{host_free_bytes} on the host; free some memory"
            )
        return replace(
            self,
            sizes=sizes,
            copy_bytes=min(self.copy_bytes, limit),
            pin_bytes=min(self.pin_bytes, limit),
            update_numel=min(self.update_numel, limit // 12),
            step_numel=min(self.step_numel, limit // 16),
        )
