"""aiconfigurator's devices, by their own names and by the folders that hold their tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moirai_sim.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

SOURCE = "NVIDIA aiconfigurator (Apache-2.0)"

DEVICES = {
    "NVIDIA A100-SXM4-80GB": "nvidia-a100-sxm-80gb", "NVIDIA A100-SXM4-40GB": "nvidia-a100-sxm-40gb",
    "NVIDIA A100 80GB PCIe": "nvidia-a100-pcie-80gb", "NVIDIA H100 80GB HBM3": "nvidia-h100-sxm",
    "NVIDIA H100 PCIe": "nvidia-h100-pcie", "NVIDIA H200": "nvidia-h200-sxm", "NVIDIA B200": "nvidia-b200-sxm",
    "NVIDIA B300": "nvidia-b300-sxm", "NVIDIA GB200": "nvidia-gb200", "NVIDIA GB300": "nvidia-gb300",
    "NVIDIA L4": "nvidia-l4", "NVIDIA L40S": "nvidia-l40s", "NVIDIA A30": "nvidia-a30",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": "nvidia-rtx-pro-6000-server",
}  # fmt: skip
"""Catalog name of each device of the data set."""
SYSTEMS = {
    "a100_sxm": "nvidia-a100-sxm-80gb", "a100_pcie": "nvidia-a100-pcie-80gb", "a30": "nvidia-a30",
    "h100_sxm": "nvidia-h100-sxm",
    "h100_pcie": "nvidia-h100-pcie", "h200_sxm": "nvidia-h200-sxm", "b200_sxm": "nvidia-b200-sxm",
    "b300_sxm": "nvidia-b300-sxm", "gb200": "nvidia-gb200", "gb300": "nvidia-gb300", "l4": "nvidia-l4",
    "l40s": "nvidia-l40s", "rtx_pro_6000_server": "nvidia-rtx-pro-6000-server", "b60": "intel-arc-pro-b60",
}  # fmt: skip
"""Catalog name by folder, for devices whose own name is not in `DEVICES`."""


def device_name(file: Path, device: str = "") -> str:
    """Return the catalog name of the device of a table.

    Raises
    ------
    InputError
        If neither the device nor a folder above the file is known.
    """
    name = DEVICES.get(device) or next((SYSTEMS[p.name] for p in file.absolute().parents if p.name in SYSTEMS), None)
    if name is None:
        raise InputError(f"{file}: unknown device '{device}'; known: {', '.join(DEVICES)}")
    return name
