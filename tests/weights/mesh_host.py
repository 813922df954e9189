"""One of several processes that load a checkpoint over a mesh of all their devices."""

import json
import pathlib
import sys

import numpy as np

from vlm.cluster import processes
from vlm.errors import VlmError

TEXTS = ["a photo of a cat", "two dogs", "a red circle on a mat", "", "five"]


def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (20 + i, 50 - i, 3)).astype(np.uint8) for i in range(5)]


def main(checkpoint: str, fsdp: str, out: str) -> None:
    processes.start()
    import jax

    import vlm
    from vlm.config import MeshConfig
    from vlm.sharding import make_mesh
    from vlm.weights.rules import flat_arrays

    me, folder = jax.process_index(), pathlib.Path(out)
    mesh = make_mesh(MeshConfig(data=-1, fsdp=int(fsdp)))
    bundle = vlm.load(checkpoint, mesh=mesh)
    parts, held = {}, {}
    for name, array in flat_arrays(bundle.model):
        parts[name] = [str(axis) for axis in array.sharding.spec if axis]
        for shard in array.addressable_shards:
            assert shard.device.process_index == me
            key = [[s.start or 0, n if s.stop is None else s.stop] for s, n in
                   zip(shard.index, array.shape, strict=True)]  # fmt: skip
            held[f"{name} {shard.device.id} {json.dumps(key)}"] = np.asarray(shard.data)
    np.savez(folder / f"held{me}.npz", **held)
    z_image, z_text = bundle.encode_image(images()), bundle.encode_text(TEXTS)
    scale = bundle.logit_scale
    bundle.save(folder / "saved")
    try:
        vlm.load(checkpoint, mesh=mesh, tower="none")
    except VlmError as error:
        refused = str(error)
    np.savez(folder / f"encoded{me}.npz", image=z_image, text=z_text, scale=scale)
    (folder / f"output{me}.json").write_text(json.dumps({"parts": parts, "refused": refused}))


if __name__ == "__main__":
    main(*sys.argv[1:])
