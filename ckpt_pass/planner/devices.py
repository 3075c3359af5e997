"""Devices by name, as their data sheets have them: dense rates, without sparsity.

Products in fp32 are those without TF32, as torch computes them by default. Links are one way of the
PCI Express connector: 32 GB/s of 16 lanes of the fourth generation, 64 GB/s of the fifth (PCI-SIG).
The launch of a kernel is that of ``graph.cost.ROOFLINES``. A gigabyte counts as 10**9 bytes: some
of what is there is never free.
"""

from __future__ import annotations

from typing import TypeAlias

from ckpt_pass._errors import CkptPassError, nearest
from ckpt_pass.planner.device import Device, InvalidDeviceError

#: A name, or a device of one's own.
DeviceLike: TypeAlias = str | Device


#: What torch gives cuBLAS (``parseChosenWorkspaceSize``) and cuBLASLt, where that has its own, by
#: default: ``aten/src/ATen/cuda/CublasHandlePool.cpp``. Hopper cards have a larger one.
_CUBLAS = 2 * 2**22 + 8 * 2**14 + 2**20
_CUBLAS_OF_HOPPER = 2**25 + 2**20


class UnknownDeviceError(CkptPassError):
    """A device that is not in the table."""


def _device(
    name: str,
    memory_bytes: int,
    half: float,
    single: float,
    bytes_per_s: float,
    host_bytes_per_s: float,
    product_workspace_bytes: int = _CUBLAS,
) -> Device:
    rates = (("bfloat16", half), ("float16", half), ("float32", single))
    return Device(
        name,
        memory_bytes,
        rates,
        bytes_per_s,
        host_bytes_per_s,
        product_workspace_bytes=product_workspace_bytes,
    )


#: What the figures are from stands above each device: memory, half and single precision, bandwidth.
DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        # NVIDIA A100 Tensor Core GPU data sheet (June 2021): 40 GB, 312 and 19.5 Tflop/s,
        # 1,555 GB/s, PCIe 4.
        _device("a100-40gb", 40 * 10**9, 312e12, 19.5e12, 1555e9, 32e9),
        # The same, SXM 80 GB: 2,039 GB/s.
        _device("a100-80gb", 80 * 10**9, 312e12, 19.5e12, 2039e9, 32e9),
        # NVIDIA H100 Tensor Core GPU data sheet, SXM: 80 GB, 1,979 with sparsity and 67 Tflop/s,
        # 3.35 TB/s, PCIe 5.
        _device("h100", 80 * 10**9, 989e12, 67e12, 3350e9, 64e9, _CUBLAS_OF_HOPPER),
        # The same, PCIe: 1,513 with sparsity and 51 Tflop/s, 2 TB/s.
        _device("h100-pcie", 80 * 10**9, 756e12, 51e12, 2000e9, 64e9, _CUBLAS_OF_HOPPER),
        # NVIDIA H200 data sheet, SXM: 141 GB, rates of the H100, 4.8 TB/s, PCIe 5.
        _device("h200", 141 * 10**9, 989e12, 67e12, 4800e9, 64e9, _CUBLAS_OF_HOPPER),
        # NVIDIA L4 data sheet: 24 GB, 242 with sparsity and 30.3 Tflop/s, 300 GB/s, PCIe 4.
        _device("l4", 24 * 10**9, 121e12, 30.3e12, 300e9, 32e9),
        # NVIDIA L40S data sheet: 48 GB, 362 and 91.6 Tflop/s, 864 GB/s, PCIe 4.
        _device("l40s", 48 * 10**9, 362e12, 91.6e12, 864e9, 32e9),
        # NVIDIA Ada GPU architecture, appendix A (2022): 24 GB, 165.2 (sums in fp32) and
        # 82.6 Tflop/s, 1,008 GB/s, PCIe 4.
        _device("rtx-4090", 24 * 10**9, 165.2e12, 82.6e12, 1008e9, 32e9),
        # AMD Instinct MI300X data sheet (2023): 192 GB, 1,307.4 and 163.4 Tflop/s, 5.3 TB/s,
        # PCIe 5. What torch gives rocBLAS is not known here.
        _device("mi300x", 192 * 10**9, 1307.4e12, 163.4e12, 5300e9, 64e9, 0),
        # A few server cores, as in graph.cost.ROOFLINES; 64 GB stand for any amount.
        Device("cpu", 64 * 10**9, (("float32", 5e10),), 1e10, 1e10, 1e-6, 1.0, "cpu"),
    )
}


def as_device(device: DeviceLike) -> Device:
    """The device that is meant.

    Raises:
        UnknownDeviceError: no device has that name; the nearest is named.
        InvalidDeviceError: it is neither a name nor a device.
    """
    if isinstance(device, Device):
        return device
    if not isinstance(device, str):
        raise InvalidDeviceError(
            f"Got device={device!r} of type {type(device).__name__}, expected a name such as "
            "'h100', or a ckpt_pass.Device(...)."
        )
    found = DEVICES.get(device.lower().replace(" ", "-").replace("_", "-"))
    if found is None:
        raise UnknownDeviceError(
            f"Got device={device!r}.{nearest(device.lower(), DEVICES)} Expected one of "
            f"{', '.join(DEVICES)}, or a ckpt_pass.Device(...) with its memory and rates."
        )
    return found
