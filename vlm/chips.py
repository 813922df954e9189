"""Published specifications of TPUs and GPUs, each with its source (vlm/chips.toml).

Peak FLOP/s are dense bfloat16 matrix products with float32 accumulation. Interconnect bandwidths
are for one direction: per link of the torus (TPU), or in total (NVLink, or PCIe without NVLink).
`network` is the bandwidth to other machines, divided by the chips of a machine. Host threads and
memory are those of Google Cloud's machine types with 4 TPUs or 8 GPUs
(docs.cloud.google.com/tpu/docs and /compute/docs/gpus), of AWS's g6e.48xlarge for the L40S, and
of one superchip for GH200.
"""

import os
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


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
    source: str
    cores: int | None = None  # hardware threads per machine (vCPUs)
    host_memory: float | None = None  # bytes per machine
    clock: float | None = None  # cycles per second, where they are known
    unit: int = 16  # rows and columns of a matrix unit
    vmem: int = 0  # bytes of vector memory of a TPU core
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


def _read() -> tuple[dict[str, Chip], dict[str, str]]:
    """Read chips.toml: the chips by name, and the chip of each device kind."""
    chips, kinds = {}, {}
    for name, entry in tomllib.loads(Path(__file__).with_suffix(".toml").read_text()).items():
        kinds |= dict.fromkeys(entry.pop("kinds"), name)
        for field in ("memory", "reserved"):
            if (gib := entry.pop(f"{field}_gib", None)) is not None:
                entry[field] = gib * 2**30
        entry["vmem"] = entry.pop("vmem_mib", 0) * 2**20
        chips[name] = Chip(name, **entry)
    return chips, kinds


CHIPS, KINDS = _read()


def chip_of(device_kind: str) -> Chip | None:
    """Return the chip of a JAX device kind, or None if the table has none (such as a CPU)."""
    # An L40 is not an L4, but a GH200 contains H200: the longest match counts.
    matches = [k for k in KINDS if re.search(rf"{k}(?!\d)", device_kind, re.IGNORECASE)]
    return CHIPS[KINDS[max(matches, key=len)]] if matches else None


def published_rate(devices: Sequence[Any]) -> float | None:
    """Return the summed peak FLOP/s of JAX devices of one kind, or None for an unknown chip."""
    chip = chip_of(devices[0].device_kind)
    return len(devices) * chip.flops / chip.devices if chip else None
