"""Peak memory of loading: models of 0.4 to 2.5 billion parameters from files of several layouts.

    python tests/weights/large_load.py [--size l|h|bigg] [--layout f32 bf16 f16 ...] [--devices 8]

The folder is transformers' form of a CLIP, random numbers in one file, in shards (`--shard 1`, in
GiB), or in torch's pickle (`--pickle`, whose archive is written here without torch). Each load is a
process of its own. Its peak above the imports stands beside the bytes of the file and of the
parameters. `--devices 8` shards the parameters over the axis fsdp of 8 virtual devices.
"""

import argparse
import io
import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
SIZES = {  # width, MLP, depth, heads of the vision tower, patch; width, heads, depth of the text's
    "l": ((1024, 4096, 24, 16, 14), (768, 12, 12), 768),
    "h": ((1280, 5120, 32, 16, 14), (1024, 16, 24), 1024),
    "bigg": ((1664, 8192, 48, 16, 14), (1280, 20, 32), 1280),
}
WIDTH = {"f32": 4, "bf16": 2, "f16": 2}

LOAD = """
import re, sys, time
import jax, jax.numpy as jnp
import vlm
from vlm.bundle import load
from vlm.config import MeshConfig
from vlm.sharding import make_mesh

def memory(field):
    return int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

jnp.zeros(1).block_until_ready()
devices = len(jax.devices())
mesh = make_mesh(MeshConfig(data=1, fsdp=devices)) if devices > 1 else None
open("/proc/self/clear_refs", "w").write("5")
before, began = memory("VmRSS"), time.perf_counter()
model = load(sys.argv[1], dtype=sys.argv[2], mesh=mesh).model
leaves = jax.tree.leaves(model)
jax.block_until_ready(leaves)
print(sum(x.size for x in leaves), sum(x.nbytes for x in leaves), before, memory("VmHWM"),
      time.perf_counter() - began)
"""


def config(size: str) -> dict:
    vision, text, embed_dim = SIZES[size]
    return {
        "model_type": "clip",
        "projection_dim": embed_dim,
        "vision_config": dict(
            zip(
                ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "patch_size"), vision, strict=True,
            ),
            image_size=224,
        ),
        "text_config": dict(
            zip(("hidden_size", "num_attention_heads", "num_hidden_layers"), text, strict=True),
            intermediate_size=4 * text[0],
        ),
    }  # fmt: skip


def write(folder: pathlib.Path, size: str, layout: str, shard: int, pickled: bool) -> int:
    """Write the folder, a tensor at a time; return the bytes of its weights."""
    import jax.numpy as jnp

    from vlm.weights import huggingface
    from vlm.weights.instantiate import abstract_model
    from vlm.weights.rules import expand, flat_shapes

    values = config(size)
    (folder / "config.json").write_text(json.dumps(values))
    golden = ROOT / "tests" / "weights" / "golden" / "hf_clip"
    pixels = json.loads((golden / "preprocessor_config.json").read_text())
    pixels |= {"crop_size": {"height": 224, "width": 224}, "size": {"shortest_edge": 224}}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(golden / name, folder)
    skeleton = flat_shapes(abstract_model(huggingface.model_config(values, "here"), jnp.float32))
    places = expand(huggingface.RULES["clip"], skeleton)
    shapes = {place.theirs: place.their_shape for place in places}
    noise = np.random.default_rng(0).standard_normal(1 << 20, np.float32) * 0.02

    def data(shape: tuple[int, ...]) -> bytes:
        flat = np.resize(noise, int(np.prod(shape)))
        if layout == "bf16":
            flat = (flat.view(np.uint32) >> 16).astype(np.uint16)
        return (flat.astype(np.float16) if layout == "f16" else flat).tobytes()

    files: list[dict[str, tuple[int, ...]]] = [{}]
    room = WIDTH[layout] * sum(int(np.prod(shape)) for shape in shapes.values())
    limit = shard << 30 or room
    held = 0
    for name, shape in shapes.items():
        count = WIDTH[layout] * int(np.prod(shape))
        if held + count > limit:
            files, held = [*files, {}], 0
        files[-1][name] = shape
        held += count
    stem, ending = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    index = {}
    for number, tensors in enumerate(files):
        part = "" if len(files) == 1 else f"-{number + 1:05}-of-{len(files):05}"
        file = folder / f"{stem}{part}.{ending}"
        index |= dict.fromkeys(tensors, file.name)
        (write_pickle if pickled else write_safetensors)(file, tensors, layout, data)
    if len(files) > 1:
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": index}))
    return room


def write_safetensors(file, tensors, layout, data) -> None:
    header, offset = {}, 0
    for name, shape in tensors.items():
        end = offset + WIDTH[layout] * int(np.prod(shape))
        header[name] = {"dtype": layout.upper(), "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for shape in tensors.values():
            out.write(data(shape))


def write_pickle(file, tensors, layout, data) -> None:
    """The archive that torch.save writes for a dict of tensors, by the opcodes of its pickle."""
    kind = {"f32": "FloatStorage", "bf16": "BFloat16Storage", "f16": "HalfStorage"}[layout]
    text = io.BytesIO()

    def string(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def numbers(values) -> bytes:
        return b"(" + b"".join(b"J" + struct.pack("<i", n) for n in values) + b"t"

    text.write(b"\x80\x02}(")
    for key, (name, shape) in enumerate(tensors.items()):
        count = int(np.prod(shape))
        steps = [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
        text.write(string(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(")
        text.write(b"(" + string("storage") + f"ctorch\n{kind}\n".encode() + string(str(key)))
        text.write(string("cpu") + b"J" + struct.pack("<i", count) + b"tQ")
        text.write(b"K\x00" + numbers(shape) + numbers(steps) + b"\x89")
        text.write(b"ccollections\nOrderedDict\n)RtR")
    text.write(b"u.")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", text.getvalue())
        for key, shape in enumerate(tensors.values()):
            archive.writestr(f"archive/data/{key}", data(shape))
        archive.writestr("archive/version", "3\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="bigg", choices=list(SIZES))
    parser.add_argument("--layout", nargs="+", default=["f32", "bf16"], choices=list(WIDTH))
    parser.add_argument("--dtypes", nargs="+", default=["stored"])
    parser.add_argument("--shard", type=int, default=0, help="GiB; 0: one file")
    parser.add_argument("--pickle", action="store_true")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--folder", help="where the files are written for a while")
    args = parser.parse_args()
    flags = f"--xla_force_host_platform_device_count={args.devices}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    for layout in args.layout:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            size = write(pathlib.Path(folder), args.size, layout, args.shard, args.pickle)
            for dtype in args.dtypes:
                line = [sys.executable, "-c", LOAD, folder, dtype]
                done = subprocess.run(line, env=env, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
                count, held, before, peak, seconds = map(float, done.stdout.split())
                kind = "pickle" if args.pickle else "safetensors"
                print(
                    f"{layout} {kind} as {dtype}: {count / 1e9:.2f} billion parameters, file "
                    f"{size / 2**30:.2f} GiB, parameters {held / 2**30:.2f} GiB, peak "
                    f"{(peak - before) / 2**30:.2f} GiB above {before / 2**30:.2f} GiB of imports: "
                    f"{(peak - before) / size:.3f}x the file, {seconds:.0f} s",
                    flush=True,
                )


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
