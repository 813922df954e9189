"""Compile a small model on every mesh of every slice of 4 to 512 chips, and count.

    python tests/planning/all_meshes.py                      # all of them: days on two cores
    python tests/planning/all_meshes.py --chips v5e v6e --most 64 --sample 100
    python tests/planning/all_meshes.py --layout             # lay out alone, in a minute

Each line says a mesh, and how it went; one that is in the file of `--done` already is left out, so
that a long round goes on where it was stopped.
"""

import argparse
import random
import sys
import time
from pathlib import Path

from small import TPU_HEADS, experiment

from vlm.chips import CHIPS
from vlm.config import MeshConfig
from vlm.errors import VlmError
from vlm.planning.compile import DoesNotFit, compile_step, on_platform
from vlm.planning.topology import CUBES, FLAT, parse_topology, topology_devices
from vlm.sharding import batch_shard, make_mesh

SLICES = ("2xv5e:4x4", "2xv4:2x2x2", "4xv6e:2x2", "2xv5p:2x2x2", "2xtpu7x:2x2x1")


def topologies(kinds: list[str], least: int, most: int) -> list[str]:
    """The slices of these chips, by size; the longest known cubes and no multiples of them."""
    names = []
    for kind in kinds:
        shapes = FLAT if CHIPS[kind].dimensions == 2 else CUBES
        names += [f"{kind}:{shape}" for shape in shapes]
    names += [name for name in SLICES if name.split(":")[0].split("x", 1)[1] in kinds]
    parsed = [parse_topology(name) for name in names]
    return [t.name for t in sorted(parsed, key=lambda t: t.chips) if least <= t.chips <= most]


def meshes(devices: int, slices: int = 1) -> list[MeshConfig]:
    """All sizes of data x fsdp x tensor that multiply to so many devices."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    return [
        MeshConfig(data, fsdp, devices // data // fsdp)
        for data in divisors
        if data % slices == 0
        for fsdp in divisors
        if devices // data % fsdp == 0
    ]


def compile_one(name: str, config: MeshConfig) -> str:
    """How the step of a small model compiles on a mesh: "ok", or what was wrong."""
    e = experiment(2048, mesh=config, **TPU_HEADS)
    try:
        mesh = make_mesh(config, topology_devices(parse_topology(name)))
        batch_shard(mesh)
        step = compile_step(on_platform(e, "tpu"), mesh)
    except VlmError as error:
        return f"refused: {error}"
    except Exception as error:  # whatever the compiler raises is what is looked for
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return "does not fit" if isinstance(step, DoesNotFit) else "ok"


def lay_out_one(name: str, config: MeshConfig) -> str:
    """Whether a mesh can be laid out, with shares of the batch that its hosts can read."""
    try:
        batch_shard(make_mesh(config, topology_devices(parse_topology(name))))
    except Exception as error:
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return "ok"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = [name for name, chip in CHIPS.items() if chip.platform == "tpu"]
    parser.add_argument("--chips", nargs="+", default=kinds, choices=kinds)
    parser.add_argument("--least", type=int, default=4, help="chips of the smallest slice")
    parser.add_argument("--most", type=int, default=512, help="chips of the largest slice")
    parser.add_argument("--sample", type=int, help="so many, drawn with seed 0, in place of all")
    parser.add_argument("--layout", action="store_true", help="lay the meshes out, compile nothing")
    parser.add_argument("--done", type=Path, help="a file of results to go on from and write to")
    args = parser.parse_args()
    every = []
    for name in topologies(args.chips, args.least, args.most):
        topology = parse_topology(name)
        every += [(name, m) for m in meshes(topology.device_count, topology.slices)]
    count = len(every)
    if args.sample:
        every = random.Random(0).sample(every, min(args.sample, count))
    done = {}
    if args.done and args.done.exists():
        lines = (line.split("\t") for line in args.done.read_text().splitlines())
        done = {(name, mesh): how for name, mesh, how in lines}
    for name, m in every:
        text = f"{m.data}x{m.fsdp}x{m.tensor}"
        if (name, text) in done:
            continue
        began = time.perf_counter()
        how = (lay_out_one if args.layout else compile_one)(name, m)
        done[name, text] = how
        if not args.layout or how != "ok":
            print(f"{name:>16} {text:>10} {how} ({time.perf_counter() - began:.0f} s)", flush=True)
        if args.done:
            with args.done.open("a") as file:
                file.write(f"{name}\t{text}\t{how}\n")
    good = sum(how == "ok" for how in done.values())
    print(f"{good} of {len(done)} meshes {'laid out' if args.layout else 'compiled'}, of {count}")
    return good != len(done)


if __name__ == "__main__":
    sys.exit(main())
