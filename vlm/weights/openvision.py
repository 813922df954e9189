"""OpenVision's checkpoints for JAX: an Orbax checkpoint below an `open_clip_config.json`.

https://github.com/UCSC-VLAA/OpenVision keeps parameters, optimizer and caption decoder in
`jax_orbax_weight/`, beside the same model for open_clip, whose config describes preprocessing and
tokenizer. The shapes give the sizes of the towers. According to the code (src/models/vit.py,
text_transformer.py), epsilons are Flax's, and image positions that are not stored are sinusoidal.
"""

import dataclasses
import math
import os

import numpy as np
from etils import epath
from jaxtyping import Float32, Shaped

from vlm.errors import CheckpointError, brief
from vlm.paths import is_remote, on_disk
from vlm.weights import open_clip
from vlm.weights.checkpoint import Checkpoint, ComputedTensors, weight_names
from vlm.weights.fields import read_json
from vlm.weights.files import Tensors
from vlm.weights.flax_layers import attention, block, merged_attention, norm
from vlm.weights.rules import SCALAR_1, Rule, Shapes, leading

_FOLDER = "jax_orbax_weight"
_METADATA = "_METADATA"  # JSON of the tree
_SMALL = 1 << 28  # bytes, below which the claimed size is not checked
_MOST_COMPRESSED = 32  # times; weights are hardly compressed
_MANIFEST = "manifest.ocdbt"  # of the store that holds a tree's arrays
_POSITION, _STEM = "img/pos_embedding", "img/embedding/kernel"
_NORM_EPS = 1e-6  # flax's


def recognises(path: epath.Path) -> bool:
    """Whether `path` is such a checkpoint, or a folder without other weights."""
    if any((path / name).exists() for name in weight_names(*open_clip.WEIGHTS)):
        return False
    return _tree(path) is not None


def open_checkpoint(path: epath.Path) -> Checkpoint:
    """Open the checkpoint at or below a folder."""
    tree = _tree(path)
    assert tree is not None  # `recognises` has found it
    folder = next((parent for parent in tree.parents if open_clip.recognises(parent)), None)
    if folder is None:
        raise CheckpointError(
            f"{path} is an Orbax checkpoint that does not identify its model: OpenVision's lie "
            "below an open_clip_config.json (get the whole repository), and a run of vlm is named "
            "by its own folder"
        )
    tensors: Tensors = OrbaxTree(tree)
    checkpoint = open_clip.assemble(folder, tensors)
    config = checkpoint.config
    if _POSITION not in tensors.shapes:
        stem = tensors.shapes.get(_STEM, ())
        if len(stem) != 4 or 0 in stem:
            raise CheckpointError(f"{tensors.where} has no {_STEM}: it is no OpenVision")
        table = sinusoidal_positions(config.vision.image_size // stem[0], stem[3])[None]
        computed = {_POSITION: (table.shape, lambda start, stop: table[start:stop])}
        tensors = ComputedTensors(tensors, computed)
    vision, text = (
        dataclasses.replace(tower, norm_eps=_NORM_EPS) for tower in (config.vision, config.text)
    )
    config = dataclasses.replace(config, vision=vision, text=text)
    return dataclasses.replace(
        checkpoint,
        config=config,
        tensors=tensors,
        rules=rules(tensors.shapes),
        ignored=lambda name: name.startswith("txt_decoder/"),  # for captions
    )


def _tree(path: epath.Path) -> epath.Path | None:
    """Find the tree of arrays at or below a folder; of several steps, the newest."""
    while path.is_dir():
        if (path / _MANIFEST).exists():
            return path
        names = {child.name for child in path.iterdir()}
        steps = sorted((name for name in names if name.isdigit()), key=int)
        ways = [n for n in (_FOLDER, "checkpoint.npz", *steps[-1:], "default") if n in names]
        if not ways:
            return None
        path = path / ways[0]
    return None


class OrbaxTree:
    """Parameters of an Orbax checkpoint, each read from its store on demand.

    Names are paths in the tree without "params/". All other arrays are left out.

    Raises:
        CheckpointError: the store is corrupt, or claims far more than its files hold.
    """

    def __init__(self, folder: epath.Path):
        import tensorstore  # only these models need it, and it takes a while

        self.where = os.fspath(folder)
        place = self.where if is_remote(folder) else f"file://{on_disk(folder)}"
        self._store = {"driver": "ocdbt", "base": f"{place}/"}
        form: dict = {"driver": "auto"}
        about = read_json(folder / _METADATA) if (folder / _METADATA).exists() else {}
        if about.get("store_array_data_equal_to_fill_value"):  # Orbax from 0.11 on
            # A part that is missing is an error. By default it would be read as zeros.
            driver = "zarr3" if about.get("use_zarr3") else "zarr"
            form = {"driver": driver, "fill_missing_data_reads": False}
        try:
            keys = tensorstore.KvStore.open(self._store).result().list().result()
            names = sorted({key.decode().partition("/")[0] for key in keys})
            opened = {
                name.removeprefix("params.").replace(".", "/"): tensorstore.open(
                    form | {"kvstore": self._store | {"path": f"{name}/"}}, open=True, read=True
                )
                for name in names
                if name.startswith("params.")
            }
            self._arrays = {name: array.result() for name, array in opened.items()}
        except (ValueError, OSError) as error:
            raise self._corrupt(error) from None
        self.shapes = {name: tuple(array.shape) for name, array in self._arrays.items()}
        if not is_remote(folder):
            self._check_size(folder)

    def _check_size(self, folder: epath.Path) -> None:
        """Refuse arrays that take far more memory than the files: parts are missing, or a bomb."""
        claimed = sum(
            math.prod(x.shape) * x.dtype.numpy_dtype.itemsize for x in self._arrays.values()
        )
        files = (os.path.join(at, name) for at, _, names in os.walk(folder) for name in names)
        stored = sum(map(os.path.getsize, files))
        if claimed > _SMALL and claimed > _MOST_COMPRESSED * stored:
            raise CheckpointError(
                f"{self.where} claims {claimed:,} bytes of arrays in files of {stored:,}: it is "
                "corrupt, download it again"
            )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Shaped[np.ndarray, "..."]:
        array = self._arrays[name]
        try:
            return (array[start:stop] if array.shape else array).read().result()
        except (ValueError, OSError) as error:
            raise self._corrupt(error) from None

    def _corrupt(self, error: Exception) -> CheckpointError:
        return CheckpointError(f"{self.where} is corrupt ({brief(str(error))}): download it again")


def sinusoidal_positions(grid: int, width: int) -> Float32[np.ndarray, "positions width"]:
    """Position embeddings of a square grid of patches, after a row of zeros for the class token.

    Sines and cosines of x, then of y, at frequencies from 1 down to 1/10,000 (MoCo v3,
    arXiv:2104.02057).
    """
    steps = np.arange(width // 4, dtype=np.float32) / np.float32(width // 4 - 1)
    frequencies = 1 / np.float32(10_000) ** steps
    y, x = np.mgrid[:grid, :grid].reshape(2, -1, 1).astype(np.float32) * frequencies
    waves = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)
    return np.concatenate([np.zeros_like(waves[:1]), waves])


def rules(shapes: Shapes) -> list[Rule]:
    """Rules of a model whose parameters have these `shapes`."""
    return [
        Rule("t", "logit_scale", SCALAR_1),
        Rule("img/cls", "vision.class_token", leading(2)),
        Rule(_POSITION, "vision.position", leading(1)),
        Rule(_STEM, "vision.stem.kernel"),
        *_encoder("img", "vision", shapes),
        Rule("img/head/kernel", "vision.projection.kernel"),
        Rule("txt/Embed_0/embedding", "text.embedding"),
        Rule("txt/pos_embedding", "text.position", leading(1)),
        *_encoder("txt", "text", shapes),
        Rule("txt/head/kernel", "text.projection.kernel"),
    ]


def _encoder(theirs: str, ours: str, shapes: Shapes) -> list[Rule]:
    layer = f"{theirs}/Transformer/encoderblock_{{}}"
    # `use_dense_general` decides whether heads are an axis of the kernels.
    kernel = f"{layer}/MultiHeadDotProductAttention_0/query/kernel".format(0)
    kind = attention if len(shapes.get(kernel, ())) == 3 else merged_attention
    return [
        *block(layer, f"{ours}.transformer.blocks", kind),
        *norm(f"{theirs}/encoder_norm", f"{ours}.norm"),
    ]
