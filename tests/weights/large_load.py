"""A folder of 2.5 billion parameters onto eight devices: the memory of the process, and the time.

    python tests/weights/large_load.py [--layout f32 bf16 ...]

The folder is transformers' form of a CLIP of bigG's size, random numbers in files of 4 GB. Each
load is a process of its own on 8 virtual devices, parameters cut over `fsdp`; the most that it ever
held, JAX and all, stands beside the bytes of the parameters in the type that was asked for.
"""

import argparse
import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = {
    "model_type": "clip",
    "projection_dim": 1280,
    "vision_config": {"hidden_size": 1664, "intermediate_size": 8192, "num_hidden_layers": 48,
                      "num_attention_heads": 16, "patch_size": 14, "image_size": 224},
    "text_config": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
                    "num_attention_heads": 20},
}  # fmt: skip
SHARD = 4 << 30  # bytes

LOAD = """
import resource, sys, time
import jax
import vlm
from vlm.config import MeshConfig
from vlm.sharding import make_mesh
began = time.perf_counter()
model = vlm.load(sys.argv[1], dtype=sys.argv[2], mesh=make_mesh(MeshConfig(data=1, fsdp=8))).model
leaves = jax.tree.leaves(model)
jax.block_until_ready(leaves)
print(sum(x.size for x in leaves), sum(x.nbytes for x in leaves),
      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, time.perf_counter() - began)
"""


def write(folder: pathlib.Path, dtype: str) -> None:
    """The folder, a tensor at a time."""
    import jax.numpy as jnp

    from vlm.weights import huggingface
    from vlm.weights.instantiate import abstract_model
    from vlm.weights.rules import expand, flat_shapes

    (folder / "config.json").write_text(json.dumps(CONFIG))
    golden = ROOT / "tests" / "weights" / "golden" / "hf_clip"
    pixels = json.loads((golden / "preprocessor_config.json").read_text())
    side = CONFIG["vision_config"]["image_size"]
    pixels |= {"crop_size": {"height": side, "width": side}, "size": {"shortest_edge": side}}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    shutil.copy(golden / "tokenizer_config.json", folder)
    shutil.copy(ROOT / "vlm" / "weights" / "clip" / "tokenizer.json", folder)
    skeleton = flat_shapes(abstract_model(huggingface.model_config(CONFIG, "here"), jnp.float32))
    places = expand(huggingface.RULES["clip"], skeleton)
    shapes = {place.theirs: place.their_shape for place in places}
    width = 4 if dtype == "f32" else 2
    files, size = [{}], 0
    for name, shape in shapes.items():
        bytes_of = width * int(np.prod(shape))
        if size + bytes_of > SHARD:
            files, size = [*files, {}], 0
        files[-1][name], size = (shape, size, size + bytes_of), size + bytes_of
    noise = np.random.default_rng(0).standard_normal(1 << 20, np.float32) * 0.02
    index = {}
    for number, tensors in enumerate(files):
        file = f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        header = {n: {"dtype": dtype.upper(), "shape": s, "data_offsets": [a, b]}
                  for n, (s, a, b) in tensors.items()}  # fmt: skip
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for name, (shape, _, _) in tensors.items():
                index[name] = file
                flat = np.resize(noise, int(np.prod(shape)))
                if dtype == "bf16":
                    flat = flat.view(np.uint32) >> 16
                    flat = flat.astype(np.uint16)
                out.write(flat.tobytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layout", nargs="+", default=["f32", "bf16"], choices=["f32", "bf16"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    args = parser.parse_args()
    flags = "--xla_force_host_platform_device_count=8"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    for layout in args.layout:
        with tempfile.TemporaryDirectory() as folder:
            write(pathlib.Path(folder), layout)
            for dtype in args.dtypes:
                began = time.perf_counter()
                line = [sys.executable, "-c", LOAD, folder, dtype]
                done = subprocess.run(line, env=env, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
                count, held, peak, seconds = map(float, done.stdout.split())
                print(
                    f"{layout} files as {dtype}: {count / 1e9:.2f} billion parameters, "
                    f"{held / 2**30:.2f} GiB, at most {peak / 2**30:.2f} GiB in the process "
                    f"({peak / held:.2f}x), {seconds:.0f} s of {time.perf_counter() - began:.0f}",
                    flush=True,
                )


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
