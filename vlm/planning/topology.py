"""Slices of chips by name, and described devices to compile for."""

import contextlib
import difflib
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from vlm.chips import CHIPS, Chip, chip_of
from vlm.config import MeshConfig
from vlm.errors import ConfigError

# Slices that Cloud TPU offers (sources in chips.toml). Larger slices of the 3D generations have any
# sizes that are multiples of 4, smallest first.
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
# Accelerator type of one machine of each chip, which the compiler needs.
MACHINES = {
    "v3": "v3-8",
    "v4": "v4-8",
    "v5e": "v5litepod-4",
    "v5p": "v5p-8",
    "v6e": "v6e-4",
    "tpu7x": "tpu7x-8",
}
LARGEST = {"v4": 4096, "v5p": 6144, "tpu7x": 9216}  # chips
MOST_SLICES = 256


@dataclass(frozen=True)
class Topology:
    """One or more slices: chip, shape of a slice, and number of devices."""

    name: str
    chip: Chip | None  # None for CPUs
    shape: tuple[int, ...]
    slices: int = 1  # joined by the data center network

    @property
    def rated_chip(self) -> Chip:
        """The chip, for topologies that have published rates."""
        assert self.chip is not None, f"{self.name} has no published rates"
        return self.chip

    @property
    def chips(self) -> int:
        return self.slices * math.prod(self.shape)

    @property
    def devices_per_chip(self) -> int:
        return self.chip.devices if self.chip else 1

    @property
    def device_count(self) -> int:
        return self.chips * self.devices_per_chip

    @property
    def compiles(self) -> bool:
        """Whether it can be compiled for without the devices."""
        return self.chip is None or self.chip.platform == "tpu"


def parse_topology(name: str) -> Topology:
    """Parse a name such as "v5e:16x16", "v5p:8x8x8", "h100:8" or "cpu:8".

    "2xv5e:16x16" is two slices of that shape.

    Raises:
        ConfigError: an unknown chip or shape; the message lists the known ones.
    """
    kind, _, shape = name.strip().lower().partition(":")
    several = re.fullmatch(r"(\d+)x([a-z].*)", kind)
    slices, kind = (int(several[1]), several[2]) if several else (1, kind)
    if kind != "cpu" and kind not in CHIPS:
        close = difflib.get_close_matches(kind, CHIPS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(
            f"topology {name!r} has an unknown chip: {hint}choose one of {known_topologies()}"
        )
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise ConfigError(
            f"topology {name!r} needs a shape after the colon: choose one of {known_topologies()}"
        )
    sizes = tuple(map(int, shape.split("x")))
    if several and (kind == "cpu" or CHIPS[kind].platform != "tpu"):
        raise ConfigError(
            f"topology {name!r}: only TPUs have slices, so give the number of devices: "
            f"{kind}:{max(1, slices) * math.prod(sizes)}"
        )
    if not 1 <= slices <= MOST_SLICES:
        raise ConfigError(f"topology {name!r} has {slices} slices: choose 1 to {MOST_SLICES}")
    if kind == "cpu":
        topology = Topology(f"cpu:{shape}", None, sizes)
        if topology.chips > len(jax.devices("cpu")):
            raise ConfigError(
                f"topology {name!r} asks for {topology.chips} CPU devices and JAX has "
                f"{len(jax.devices('cpu'))}: set XLA_FLAGS="
                f"--xla_force_host_platform_device_count={topology.chips}"
            )
        return topology
    chip = CHIPS[kind]
    if not _exists(chip, sizes, shape):
        raise ConfigError(
            f"there is no {kind} slice of shape {shape}: choose one of {known_topologies(kind)}"
        )
    prefix = f"{slices}x" if slices > 1 else ""
    return Topology(f"{prefix}{kind}:{shape}", chip, sizes, slices)


def known_topologies(kind: str | None = None) -> str:
    """List the names that `parse_topology` accepts, as text."""
    texts = []
    for name, chip in CHIPS.items():
        if kind in (None, name):
            if chip.platform == "gpu":
                texts.append(f"{name}:COUNT")
            elif chip.dimensions == 2:
                texts.append(f"{name}:{{{','.join(FLAT)}}}")
            else:
                texts.append(f"{name}:{{{','.join(CUBES)},... up to {LARGEST[name]} chips}}")
    return "; ".join(texts) + ("; cpu:COUNT" if kind is None else "")


def _exists(chip: Chip, sizes: tuple[int, ...], shape: str) -> bool:
    if chip.platform == "gpu":
        return len(sizes) == 1
    if chip.dimensions == 2:
        return shape in FLAT
    cube = len(sizes) == 3 and all(s % 4 == 0 for s in sizes) and list(sizes) == sorted(sizes)
    return shape in CUBES or (cube and math.prod(sizes) <= LARGEST[chip.name])


def topology_devices(topology: Topology) -> list[Any]:
    """Devices to compile for; TPU devices are only descriptions.

    Raises:
        ConfigError: the TPU compiler is not installed or does not support the slice.
    """
    if topology.chip is None:
        return jax.devices("cpu")[: topology.chips]
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"a plan for {topology.name} needs the TPU compiler, which is not installed: "
            'pip install "vlm-jax[tpu]"'
        )
    variables = {
        # Without these the compiler queries the cloud metadata server for minutes.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": MACHINES[topology.chip.name],
        # Nothing runs, so other processes and stale lock files do not matter.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    from jax.experimental import topologies

    options = {}
    if math.prod(topology.shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip as one device
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    one_slice = f"{topology.chip.name}:{'x'.join(map(str, topology.shape))}"
    try:
        with _environment(variables):
            described = topologies.get_topology_desc(one_slice, "tpu", **options)
    except Exception as error:  # whatever the plugin raises
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"the installed TPU compiler does not accept topology {topology.name} ({reason}): "
            "choose another shape or a newer libtpu"
        ) from None
    return list(described.devices)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set those environment variables that are unset, and unset them at the end.

    They describe machines that this process does not have, so a later start of JAX's distributed
    service, or a plan for another chip, must not read them.
    """
    own = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(own)
    try:
        yield
    finally:
        for name in own:
            os.environ.pop(name, None)


def local_topology(devices: Sequence[Any]) -> Topology | None:
    """Topology of the devices of a run; None for chips without published figures."""
    chip = chip_of(devices[0].device_kind)
    if chip is None:
        return None
    slices = len({getattr(d, "slice_index", None) or 0 for d in devices})
    shape: tuple[int, ...] = (len(devices) // chip.devices // slices,)
    if chip.platform == "tpu":
        sides = zip(*(d.coords for d in devices), strict=True)
        shape = tuple(len(set(side)) for side in sides)[: max(2, chip.dimensions)]
    prefix = f"{slices}x" if slices > 1 else ""
    return Topology(f"{prefix}{chip.name}:{'x'.join(map(str, shape))}", chip, shape, slices)


def parse_mesh(text: str) -> MeshConfig:
    """Parse a mesh such as "data=32,fsdp=8", or "32x8" in the order data, fsdp, tensor.

    Raises:
        ConfigError: another form, or an unknown axis.
    """
    axes = ("data", "fsdp", "tensor")
    if re.fullmatch(r"-?\d+(x-?\d+){0,2}", text):
        return MeshConfig(**dict(zip(axes, map(int, text.split("x")), strict=False)))
    sizes: dict[str, Any] = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis.strip() not in axes or not re.fullmatch(r"-?\d+", size.strip()):
            raise ConfigError(
                f"mesh {text!r} is not understood at {part!r}: write data=32,fsdp=8,tensor=1, or "
                "32x8x1 in that order"
            )
        sizes[axis.strip()] = int(size)
    return MeshConfig(**sizes)  # data is -1 by default
