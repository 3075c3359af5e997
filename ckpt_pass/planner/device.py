"""A device on paper: its memory, its rates, its link to the host."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ckpt_pass._errors import CkptPassError, nearest

#: What large kernels reach of the rates on a data sheet: a bf16 product of 4,096 rows and columns
#: takes 0.2 ms on an H100, 0.69 of the rate that its data sheet names.
ATTAINED = 0.7

#: What torch calls the dtypes that matrix products take.
DTYPES = (
    "float64", "float32", "float16", "bfloat16",
    "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float4_e2m1fn_x2",
    "complex128", "complex64", "complex32", "int64", "int32", "int16", "int8", "uint8",
)  # fmt: skip


class InvalidDeviceError(CkptPassError):
    """A device's memory or rates are no such numbers, or it does not go with another argument."""


@dataclass(frozen=True)
class Device:
    """An accelerator as a plan sees it.

    Args:
        name: in words.
        memory_bytes: what it has.
        flops_per_s: peak rates of matrix products, as pairs of a dtype's name (``bfloat16``) and a
            rate; of a dtype that is not named the least of them counts.
        bytes_per_s: bandwidth of its memory.
        host_bytes_per_s: of the link to the host, each way.
        launch_s: what a kernel takes at the least.
        attained: the share of these rates that kernels reach.
        kind: what torch calls such devices, ``cuda`` or ``cpu``: how optimizers go, and in which
            blocks memory is handed out.
        product_workspace_bytes: what its library of matrix products gets once, and keeps; 0 where
            that is not known.

    Raises:
        InvalidDeviceError: an amount is not positive and finite, bytes are not whole, or a dtype
            is none that torch knows.
    """

    name: str
    memory_bytes: int
    flops_per_s: tuple[tuple[str, float], ...]
    bytes_per_s: float
    host_bytes_per_s: float
    launch_s: float = 3e-6
    attained: float = ATTAINED
    kind: str = "cuda"
    product_workspace_bytes: int = 0

    def __post_init__(self) -> None:
        pairs = self.flops_per_s.items() if isinstance(self.flops_per_s, dict) else self.flops_per_s
        object.__setattr__(self, "flops_per_s", tuple((str(name), rate) for name, rate in pairs))
        if not isinstance(self.name, str) or not self.name:
            raise InvalidDeviceError(
                f"Got name={self.name!r} of a Device, expected a word or some, such as 'l4'."
            )
        self._check_rates()
        self._check_bytes("memory_bytes", 1, "1 or more")
        self._check_bytes("product_workspace_bytes", 0, "or 0 where it is not known")
        if self.kind not in ("cuda", "cpu"):
            raise InvalidDeviceError(
                f"Got kind={self.kind!r} of a Device {self.name!r}, expected 'cuda' or 'cpu'."
            )
        if self.attained > 1:
            raise InvalidDeviceError(
                f"Got attained={self.attained!r} of a Device {self.name!r}, expected a share, 1 at "
                "the most."
            )

    def _check_rates(self) -> None:
        if not self.flops_per_s:
            raise InvalidDeviceError(
                f"Got a Device {self.name!r} without flops_per_s, expected rates by dtype, such as "
                "(('bfloat16', 989e12), ('float32', 67e12))."
            )
        for name, _ in self.flops_per_s:
            if name not in DTYPES:
                raise InvalidDeviceError(
                    f"Got flops_per_s of {name!r} of a Device {self.name!r}, expected what torch "
                    f"calls a dtype.{nearest(name, DTYPES)}"
                )
        rates = {f"flops_per_s of {name}": rate for name, rate in self.flops_per_s}
        named = ("bytes_per_s", "host_bytes_per_s", "launch_s", "attained")
        for name, value in (*rates.items(), *((name, getattr(self, name)) for name in named)):
            if not _is_positive(value):
                raise InvalidDeviceError(
                    f"Got {name}={value!r} of a Device {self.name!r}, expected a positive, finite "
                    "number: a time is an amount divided by a rate."
                )

    def _check_bytes(self, name: str, least: int, words: str) -> None:
        value = getattr(self, name)
        if isinstance(value, float) and value.is_integer():  # 24e9
            value = int(value)
            object.__setattr__(self, name, value)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InvalidDeviceError(
                f"Got {name}={value!r} of a Device {self.name!r}, expected a whole number of "
                f"bytes, {words}."
            )

    def rate_of(self, dtype: str) -> float:
        """Flops a second that products of a dtype reach."""
        rates = dict(self.flops_per_s)
        return self.attained * rates.get(dtype, min(rates.values()))

    def time_s(self, dtype: str, flops: int, moved_bytes: int) -> float:
        """Seconds of one kernel: the larger of arithmetic and memory traffic, and a launch."""
        memory_s = moved_bytes / (self.attained * self.bytes_per_s)
        return max(flops / self.rate_of(dtype), memory_s) + self.launch_s

    def __str__(self) -> str:
        return f"{self.name} ({self.memory_bytes / 1e9:.0f} GB)"


def _is_positive(value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return math.isfinite(value) and value > 0
