"""Layout: how one model is spread over devices; the handshake of every part of the program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from whalepod.spec.errors import UserError

Precision = Literal["bf16", "fp32"]
MAX_SIZE = 2**20


@dataclass(frozen=True)
class Layout:
    """Sizes of the mesh axes, batch and precision. A value; it validates itself.

    dp_replicate: groups of devices that each hold the whole training state.
    dp_shard: devices within a group that share it (ZeRO-3 / FSDP2; 1 is none).
    micro_batch: sequences per device and forward pass. global_batch: sequences per step, over
    all devices. precision: of compute; masters, gradient sums and reductions are float32.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    micro_batch: int = 1
    global_batch: int = 1
    precision: Precision = "bf16"

    def __post_init__(self) -> None:
        for name in ("dp_replicate", "dp_shard", "micro_batch", "global_batch"):
            value = getattr(self, name)
            # The bound keeps a slip of the keyboard from asking for terabytes of token ids.
            if not 1 <= value <= MAX_SIZE:
                raise UserError(f"layout.{name} must be at least 1 and at most {MAX_SIZE}, not {value}")
        per_pass = self.micro_batch * self.num_devices
        if self.global_batch % per_pass:
            low = self.global_batch // per_pass * per_pass
            valid = f"{low}, {low + per_pass}" if low else f"{per_pass}"
            raise UserError(
                f"layout.global_batch {self.global_batch} must be a multiple of micro_batch x devices = "
                f"{self.micro_batch} x {self.num_devices} = {per_pass}; nearest: {valid}"
            )

    @property
    def num_devices(self) -> int:
        return self.dp_replicate * self.dp_shard

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per device and optimiser step."""
        return self.global_batch // (self.micro_batch * self.num_devices)

    def check_devices(self, available: int) -> None:
        """Raises UserError unless the layout uses exactly `available` devices."""
        if self.num_devices != available:
            raise UserError(
                f"the layout needs dp_replicate x dp_shard = {self.dp_replicate} x {self.dp_shard} = "
                f"{self.num_devices} workers, but {available} were started"
            )
