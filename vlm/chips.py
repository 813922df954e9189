"""Published specifications of TPUs and GPUs, each with its source.

Peak FLOP/s are dense bfloat16 matrix products with float32 accumulation. Interconnect bandwidths
are for one direction: per link of the torus (TPU), or in total (NVLink, or PCIe without NVLink).
`network` is the bandwidth to other machines, divided by the chips of a machine. Host threads and
memory are those of Google Cloud's machine types with 4 TPUs or 8 GPUs
(docs.cloud.google.com/tpu/docs and /compute/docs/gpus), of AWS's g6e.48xlarge for the L40S, and
of one superchip for GH200.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

GB, GIB, TERA = 1e9, 2**30, 1e12


@dataclass(frozen=True)
class Chip:
    """Specification of one chip. `devices` JAX devices share its memory and rates."""

    name: str
    platform: Literal["tpu", "gpu"]
    flops: float  # per second, bfloat16
    memory: float  # bytes
    memory_rate: float  # bytes per second
    link_rate: float  # bytes per second, one direction of one link
    links: int  # of the chip: two for each dimension of its torus
    network: float  # bytes per second to other machines, per chip
    box: int  # chips of one machine; GPUs are connected by NVLink or PCIe
    cores: int | None  # hardware threads per machine (vCPUs)
    host_memory: float | None  # bytes per machine
    source: str
    unit: int = 16  # rows and columns of a matrix unit
    devices: int = 1
    reserved: float = 0.0  # bytes per device that the TPU runtime reserves

    @property
    def dimensions(self) -> int:
        """Dimensions of the torus of a slice; 0 for chips that are connected by a switch."""
        return self.links // 2 if self.platform == "tpu" else 0

    @property
    def usable(self) -> float:
        """Bytes of each device that a program may use.

        On a TPU this is the compiler's limit. On a GPU it is the fraction that JAX preallocates:
        75%, or XLA_PYTHON_CLIENT_MEM_FRACTION (docs.jax.dev, GPU memory allocation).
        """
        if self.platform == "tpu":
            return self.memory / self.devices - self.reserved
        return self.memory * float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75"))


CLOUD = "docs.cloud.google.com/tpu/docs/"
HBM = "memory: the compiler's own limit"
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "v3",
            "tpu",
            flops=123 * TERA,
            memory=32 * GIB,
            memory_rate=900 * GB,
            link_rate=70 * GB,
            links=4,
            network=3.125 * GB,
            box=4,
            cores=96,
            host_memory=340 * GB,
            unit=128,
            source=f"{CLOUD}v3; links: arXiv:2304.01433, table 4; network: taken as v5e's; {HBM}",
            devices=2,
            reserved=0.52 * GIB,
        ),
        Chip(
            "v4",
            "tpu",
            flops=275 * TERA,
            memory=32 * GIB,
            memory_rate=1228 * GB,
            link_rate=50 * GB,
            links=6,
            network=6.25 * GB,
            box=4,
            cores=240,
            host_memory=407 * GB,
            unit=128,
            source=f"{CLOUD}v4; links: arXiv:2304.01433, table 4; network: taken as v5p's; {HBM}",
            reserved=1.25 * GIB,
        ),
        Chip(
            "v5e",
            "tpu",
            flops=197 * TERA,
            memory=16 * GIB,
            memory_rate=819 * GB,
            link_rate=50 * GB,
            links=4,
            network=3.125 * GB,
            box=4,
            cores=112,
            host_memory=192 * GB,
            unit=128,
            source=(
                f"{CLOUD}v5e (400 GB/s in both directions over 4 ports; two 100 Gb/s adapters "
                f"for 8); {HBM}"
            ),
            reserved=0.25 * GIB,
        ),
        Chip(
            "v5p",
            "tpu",
            flops=459 * TERA,
            memory=95.74 * GIB,
            memory_rate=2765 * GB,
            link_rate=100 * GB,
            links=6,
            network=6.25 * GB,
            box=4,
            cores=208,
            host_memory=448 * GB,
            unit=128,
            source=(
                f"{CLOUD}v5p (1,200 GB/s in both directions; 3D torus; network of 50 Gb/s a "
                f"chip); {HBM}"
            ),
        ),
        Chip(
            "v6e",
            "tpu",
            flops=918 * TERA,
            memory=32 * GIB,
            memory_rate=1638 * GB,
            link_rate=100 * GB,
            links=4,
            network=12.5 * GB,
            box=4,
            cores=180,
            host_memory=720 * GB,
            unit=256,
            source=(
                f"{CLOUD}v6e (800 GB/s in both directions over 4 ports; four 200 Gb/s adapters "
                f"for 8); {HBM}"
            ),
            reserved=0.75 * GIB,
        ),
        Chip(
            "tpu7x",
            "tpu",
            flops=2307 * TERA,
            memory=192 * GIB,
            memory_rate=7380 * GB,
            link_rate=100 * GB,
            links=6,
            network=12.5 * GB,
            box=4,
            cores=224,
            host_memory=960 * GB,
            unit=256,
            source=(
                f"{CLOUD}tpu7x (1,200 GB/s in both directions; two devices per chip); network: "
                f"taken as v6e's; {HBM}"
            ),
            devices=2,
            reserved=1.25 * GIB,
        ),
        Chip(
            "a100",
            "gpu",
            flops=312 * TERA,
            memory=80 * GB,
            memory_rate=2039 * GB,
            link_rate=300 * GB,
            links=1,
            network=25 * GB,
            box=8,
            cores=96,
            host_memory=1360 * GB,
            source=(
                "NVIDIA A100 80GB SXM data sheet (NVLink 600 GB/s in both directions); DGX "
                "A100: 8 adapters of 200 Gb/s"
            ),
        ),
        Chip(
            "a100-40",
            "gpu",
            flops=312 * TERA,
            memory=40 * GB,
            memory_rate=1555 * GB,
            link_rate=300 * GB,
            links=1,
            network=25 * GB,
            box=8,
            cores=96,
            host_memory=680 * GB,
            source=(
                "NVIDIA A100 40GB SXM data sheet (NVLink 600 GB/s in both directions); DGX "
                "A100: 8 adapters of 200 Gb/s"
            ),
        ),
        Chip(
            "h100",
            "gpu",
            flops=989 * TERA,
            memory=80 * GB,
            memory_rate=3350 * GB,
            link_rate=450 * GB,
            links=1,
            network=50 * GB,
            box=8,
            cores=208,
            host_memory=1872 * GB,
            source=(
                "NVIDIA H100 SXM data sheet (dense; NVLink 900 GB/s in both directions); DGX "
                "H100: 8 adapters of 400 Gb/s"
            ),
        ),
        Chip(
            "h100-pcie",
            "gpu",
            flops=756 * TERA,
            memory=80 * GB,
            memory_rate=2000 * GB,
            link_rate=64 * GB,
            links=1,
            network=25 * GB,
            box=8,
            cores=None,
            host_memory=None,
            source=(
                "NVIDIA H100 PCIe data sheet (dense; PCIe 128 GB/s in both directions, a bridge "
                "of pairs left out); network: an assumption, 200 Gb/s each"
            ),
        ),
        Chip(
            "h200",
            "gpu",
            flops=989 * TERA,
            memory=141 * GB,
            memory_rate=4800 * GB,
            link_rate=450 * GB,
            links=1,
            network=50 * GB,
            box=8,
            cores=224,
            host_memory=2952 * GB,
            source=(
                "NVIDIA H200 SXM data sheet (dense; NVLink 900 GB/s in both directions); DGX "
                "H200: 8 adapters of 400 Gb/s"
            ),
        ),
        Chip(
            "gh200",
            "gpu",
            flops=990 * TERA,
            memory=96 * GB,
            memory_rate=4000 * GB,
            link_rate=50 * GB,
            links=1,
            network=50 * GB,
            box=1,
            cores=72,
            host_memory=480 * GB,
            source=(
                "NVIDIA GH200 data sheet (dense; 96 GB HBM3; one superchip a machine); network: "
                "an assumption, 400 Gb/s each"
            ),
        ),
        Chip(
            "b200",
            "gpu",
            flops=2250 * TERA,
            memory=180 * GB,
            memory_rate=7700 * GB,
            link_rate=900 * GB,
            links=1,
            network=50 * GB,
            box=8,
            cores=224,
            host_memory=3968 * GB,
            source=(
                "NVIDIA HGX B200 data sheet (dense; NVLink 1.8 TB/s in both directions); DGX "
                "B200: 8 adapters of 400 Gb/s"
            ),
        ),
        Chip(
            "l4",
            "gpu",
            flops=121 * TERA,
            memory=24 * GB,
            memory_rate=300 * GB,
            link_rate=32 * GB,
            links=1,
            network=1.5625 * GB,
            box=8,
            cores=96,
            host_memory=384 * GB,
            source=(
                "NVIDIA L4 data sheet (dense: half of 242; PCIe 64 GB/s in both directions); "
                "Google's g2-standard-96: 100 Gb/s for 8"
            ),
        ),
        Chip(
            "l40s",
            "gpu",
            flops=362 * TERA,
            memory=48 * GB,
            memory_rate=864 * GB,
            link_rate=32 * GB,
            links=1,
            network=6.25 * GB,
            box=8,
            cores=192,
            host_memory=1536 * GB,
            source=(
                "NVIDIA L40S data sheet (dense; PCIe 64 GB/s in both directions); AWS "
                "g6e.48xlarge: 400 Gb/s for 8"
            ),
        ),
    )
}

# Substrings of JAX's `Device.device_kind`, and the chip. The first match counts.
KINDS = {
    "TPU v3": "v3",
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v6": "v6e",
    "TPU7x": "tpu7x",
    "A100-SXM4-40GB": "a100-40",
    "A100-PCIE-40GB": "a100-40",
    "A100": "a100",
    "GH200": "gh200",
    "H100 PCIe": "h100-pcie",
    "H100": "h100",
    "H200": "h200",
    "B200": "b200",
    "L40S": "l40s",
    "NVIDIA L4": "l4",
}


def chip_of(device_kind: str) -> Chip | None:
    """Return the chip of a JAX device kind, or None if the table has none (such as a CPU)."""
    for part, name in KINDS.items():
        if re.search(rf"{part}(?!\d)", device_kind, re.IGNORECASE):  # an L40 is not an L4
            return CHIPS[name]
    return None


def published_rate(devices: Sequence[Any]) -> float | None:
    """Return the summed peak FLOP/s of JAX devices of one kind, or None for an unknown chip."""
    chip = chip_of(devices[0].device_kind)
    return len(devices) * chip.flops / chip.devices if chip else None
