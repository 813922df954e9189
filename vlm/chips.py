"""Published figures of the chips that the project knows, each with its source.

Peak rates are dense bfloat16 products with float32 accumulation. Interconnect figures are those
of one direction: what a chip can send in a second over one link of its torus (TPU) or in all
(NVLink).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

GB, GIB, TERA = 1e9, 2**30, 1e12


@dataclass(frozen=True)
class Chip:
    """What one chip can do. `devices` JAX devices share it, and its memory and rates."""

    name: str
    platform: Literal["tpu", "gpu"]
    flops: float  # per second, bfloat16
    memory: float  # bytes
    memory_rate: float  # bytes per second
    link_rate: float  # bytes per second, one direction of one link
    links: int  # of the chip: two for each dimension of its torus
    source: str
    devices: int = 1

    @property
    def dimensions(self) -> int:
        """Of the torus that the chips of a slice form; 0 where a switch joins them all."""
        return self.links // 2 if self.platform == "tpu" else 0


CLOUD = "docs.cloud.google.com/tpu/docs/"
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "v4",
            "tpu",
            flops=275 * TERA,
            memory=32 * GIB,
            memory_rate=1228 * GB,
            link_rate=50 * GB,
            links=6,
            source=f"{CLOUD}v4; links: arXiv:2304.01433, table 4",
        ),
        Chip(
            "v5e",
            "tpu",
            flops=197 * TERA,
            memory=16 * GIB,
            memory_rate=819 * GB,
            link_rate=50 * GB,
            links=4,
            source=f"{CLOUD}v5e (400 GB/s in both directions over 4 ports)",
        ),
        Chip(
            "v5p",
            "tpu",
            flops=459 * TERA,
            memory=95 * GIB,
            memory_rate=2765 * GB,
            link_rate=100 * GB,
            links=6,
            source=f"{CLOUD}v5p (1,200 GB/s in both directions; 3D torus)",
        ),
        Chip(
            "v6e",
            "tpu",
            flops=918 * TERA,
            memory=32 * GIB,
            memory_rate=1638 * GB,
            link_rate=100 * GB,
            links=4,
            source=f"{CLOUD}v6e (800 GB/s in both directions over 4 ports)",
        ),
        Chip(
            "tpu7x",
            "tpu",
            flops=2307 * TERA,
            memory=192 * GIB,
            memory_rate=7380 * GB,
            link_rate=100 * GB,
            links=6,
            source=f"{CLOUD}tpu7x (1,200 GB/s in both directions; two devices per chip)",
            devices=2,
        ),
        Chip(
            "a100",
            "gpu",
            flops=312 * TERA,
            memory=80 * GB,
            memory_rate=2039 * GB,
            link_rate=300 * GB,
            links=1,
            source="NVIDIA A100 80GB SXM data sheet (NVLink 600 GB/s in both directions)",
        ),
        Chip(
            "h100",
            "gpu",
            flops=989 * TERA,
            memory=80 * GB,
            memory_rate=3350 * GB,
            link_rate=450 * GB,
            links=1,
            source="NVIDIA H100 SXM data sheet (dense; NVLink 900 GB/s in both directions)",
        ),
        Chip(
            "h200",
            "gpu",
            flops=989 * TERA,
            memory=141 * GB,
            memory_rate=4800 * GB,
            link_rate=450 * GB,
            links=1,
            source="NVIDIA H200 SXM data sheet (dense; NVLink 900 GB/s in both directions)",
        ),
        Chip(
            "b200",
            "gpu",
            flops=2250 * TERA,
            memory=180 * GB,
            memory_rate=7700 * GB,
            link_rate=900 * GB,
            links=1,
            source="NVIDIA HGX B200 data sheet (dense; NVLink 1.8 TB/s in both directions)",
        ),
    )
}

# What JAX calls the devices of these chips (`Device.device_kind`), by a part of the name.
KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v6": "v6e",
    "TPU7x": "tpu7x",
    "A100": "a100",
    "H100": "h100",
    "H200": "h200",
    "B200": "b200",
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip behind a JAX device, or None where the table has none (such as a CPU)."""
    for part, name in KINDS.items():
        if part.lower() in device_kind.lower():
            return CHIPS[name]
    return None


def published_rate(devices: Sequence[Any]) -> float | None:
    """Peak operations per second of JAX devices of one kind together, where the table has them."""
    chip = chip_of(devices[0].device_kind)
    return len(devices) * chip.flops / chip.devices if chip else None
